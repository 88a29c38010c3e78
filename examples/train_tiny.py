"""Train the small language model that ships with the library, on Python's standard library.

    python examples/write_corpus.py corpus --tests
    python examples/train_tiny.py --text corpus/train.txt --heldout corpus/heldout.txt --out tiny

A Llama of 12 blocks, width 128, 4 heads with 2 key/value heads, and a tied head over a byte-level
BPE of 2,048 tokens trained on the same text: 2.4 million parameters. AdamW (0.9, 0.95), decay 0.1
on matrices, warm-up and cosine, random crops of the token stream, bf16 autocast on a GPU with each
step recorded as one CUDA graph. A fiftieth of the training documents chooses the best weights; the
held-out text is looked at once, at the end, beside `xz -9e` on the same bytes.

--quick runs all of it in about a minute of CPU, on less text, to a poor model.
"""

import argparse
import copy
import json
import lzma
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AttentionInterface,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from weightshare.language import (
    encode,
    evaluate,
    load_model,
    next_token_loss,
    read_documents,
    windows,
)
from weightshare.training import (
    Captured,
    GradientUpdate,
    Loop,
    LoopConfig,
    Place,
    Task,
    Term,
    schedule,
)

END = "<|endoftext|>"

# Plain causal attention under a name that has no mask function: for "sdpa" transformers searches
# every batch for packed sequences, which waits for the device and costs a graph the fast kernel.
AttentionInterface.register("causal", sdpa_attention_forward)


def main() -> None:
    options = parse()
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    documents = [text for path in options.text for text in read_documents(path)]
    if options.quick:
        documents = documents[:40]
    one_in = 10 if options.quick else 50
    validation = documents[::one_in]
    train = [text for place, text in enumerate(documents) if place % one_in]
    tokenizer = train_tokenizer(train, options.vocabulary, options.length)
    stream, sizes = encode(tokenizer, train)
    print(f"{len(train)} documents, {sizes.sum():,} bytes, {len(stream):,} tokens", flush=True)
    model = build(tokenizer, options).to(options.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    crops = Crops(torch.from_numpy(stream), options.length, options.batch, options.seed)
    options.steps = min(options.steps, steps_in(options, model, crops))
    chosen_by = windows(tokenizer, validation, options.length, limit=8 if options.quick else None)
    started, done = time.perf_counter(), 0
    every = max(1, options.steps // 10)

    def look() -> dict[str, float]:
        nonlocal done
        score = evaluate(model, chosen_by, batch_size=64)
        done += every
        minutes = (time.perf_counter() - started) / 60
        print(
            f"step {min(done, options.steps):>6}  validation {score.bits_per_byte:.4f} bits per "
            f"byte  {minutes:.1f} min",
            flush=True,
        )
        return {"loss": score.loss, "bits_per_byte": score.bits_per_byte}

    config = loop_config(options, evaluate_every=every)
    update = make_update(options, model, config)
    fit = Loop(update, crops, config, evaluate=look, progress=sys.stderr.isatty()).fit()
    seconds = time.perf_counter() - started
    print(f"{options.steps} steps in {seconds:.0f} s, best at step {fit.best_step}", flush=True)

    save(model, tokenizer, options.out)
    figures = measure(options) | {
        "validation_bits_per_byte": fit.evaluation["bits_per_byte"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "train": {"documents": len(train), "bytes": int(sizes.sum()), "tokens": len(stream)},
        "steps": options.steps,
        "best_step": fit.best_step,
        "seconds": round(seconds),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
    }
    write_card(options, figures)
    print(json.dumps(figures, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--text", nargs="+", required=True, help="training text, documents separated by form feeds")
    add("--heldout", required=True, help="text for the final figures")
    add("--out", type=Path, required=True, help="folder for the model")
    add("--steps", type=int, default=20_000, help="at most so many updates")
    add("--minutes", type=float, default=5.0, help="at most so long: steps are cut to fit")
    add("--batch", type=int, default=64, help="sequences per update")
    add("--length", type=int, default=512, help="tokens per sequence")
    add("--learning-rate", type=float, default=3e-3)
    add("--weight-decay", type=float, default=0.1)
    add("--vocabulary", type=int, default=2048)
    add("--width", type=int, default=128)
    add("--blocks", type=int, default=12)
    add("--init", type=float, default=0.06, help="standard deviation of the first weights")
    add("--dropout", type=float, default=0.0, help="of the attention weights")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--quick", action="store_true", help="a minute of CPU")
    options = parser.parse_args()
    options.command = " ".join(["python", "examples/train_tiny.py", *sys.argv[1:]])
    if options.quick:
        options.device = "cpu"
        options.steps, options.minutes = min(options.steps, 120), min(options.minutes, 0.6)
        options.batch, options.length = 8, 128
    return options


def train_tokenizer(texts: list[str], size: int, length: int) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=END, pad_token=END, model_max_length=length
    )


def build(tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.width,
        intermediate_size=round(options.width * 8 / 3 / 8) * 8,
        num_hidden_layers=options.blocks,
        num_attention_heads=options.width // 32,
        num_key_value_heads=max(1, options.width // 64),
        max_position_embeddings=options.length,
        attention_dropout=options.dropout,
        initializer_range=options.init,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("causal")
    with torch.no_grad():  # GPT-2: what is added to the residual starts smaller in deep models
        for layer in model.model.layers:
            for matrix in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                matrix.mul_((2 * options.blocks) ** -0.5)
    return model


class Crops:
    """Batch ``step``: random windows of the token stream, a function of seed and step alone."""

    def __init__(self, stream: Tensor, length: int, batch: int, seed: int) -> None:
        self.stream, self.batch, self.seed = stream, batch, seed
        self.places = torch.arange(length)

    def __getitem__(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        last = len(self.stream) - len(self.places)
        starts = torch.randint(last + 1, (self.batch, 1), generator=generator)
        return self.stream[starts + self.places]


class NextToken(Task):
    """Cross-entropy of the next token, summed."""

    def __init__(self, model: LlamaForCausalLM, compiled: bool) -> None:
        super().__init__()
        self.model = model
        # Not a submodule: the compiled module would hold the same parameters under other names.
        self.forward_model = torch.compile(model.forward) if compiled else model.forward

    def forward(self, batch: Tensor) -> dict[str, Term]:
        logits = self.forward_model(input_ids=batch, use_cache=False).logits
        return {"loss": Term(*next_token_loss(logits, batch, chunk=batch.numel()))}


def loop_config(options: argparse.Namespace, evaluate_every: int = 0) -> LoopConfig:
    return LoopConfig(
        steps=options.steps,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        warmup_fraction=0.03,
        final_fraction=0.02,
        precision="bf16" if options.device == "cuda" else "fp32",
        seed=options.seed,
        evaluate_every=evaluate_every,
        log_every=100,
        keep_best=True,
    )


def make_update(
    options: argparse.Namespace, model: LlamaForCausalLM, config: LoopConfig
) -> Captured:
    model.train()
    task = NextToken(model, options.compile)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
    return Captured(GradientUpdate(task, optimizer, clip=1.0, schedule=schedule(config)))


def steps_in(options: argparse.Namespace, model: LlamaForCausalLM, crops: Crops) -> int:
    """How many steps fit into ``--minutes``, timed on a copy: the cosine then ends with the run."""
    config = loop_config(options)
    update = make_update(options, copy.deepcopy(model), config)
    update.move(Place(torch.device(options.device), config.precision))
    warm, timed = (3, 5) if options.quick else (12, 40)
    for step in range(warm + timed):
        if step == warm:
            synchronize(options.device)
            started = time.perf_counter()
        update.apply(update.prepare(crops[step], step))
    synchronize(options.device)
    seconds = (time.perf_counter() - started) / timed
    print(f"{1000 * seconds:.1f} ms a step, {crops[0].numel() / seconds:,.0f} tokens/s", flush=True)
    return max(1, int(60 * options.minutes / seconds))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    stored = copy.deepcopy(model).to(device="cpu", dtype=torch.bfloat16).eval()
    stored.set_attn_implementation("sdpa")
    stored.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    stored.save_pretrained(out)
    tokenizer.save_pretrained(out)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Bits per byte of the model as saved, on all held-out bytes, beside xz on the same bytes."""
    saved = load_model(options.out, dtype="fp32", device=options.device)
    documents = read_documents(options.heldout)
    if options.quick:
        documents = documents[-1:]
    raw = Path(options.heldout).read_bytes()
    figures: dict[str, float] = {
        "heldout_bytes": len(raw),
        "xz_9e_bits_per_byte": 8
        * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))
        / len(raw),
    }
    for name, stride in (
        ("bits_per_byte", options.length - 1),
        ("bits_per_byte_half_window_of_context", options.length // 2),
    ):
        text = windows(saved.tokenizer, documents, options.length, stride=stride)
        score = evaluate(saved.model, text, batch_size=64)
        figures[name] = score.bits_per_byte
        figures.setdefault("loss", score.loss)
        figures.setdefault("loss_stderr", score.stderr)
        figures.setdefault("perplexity", score.perplexity)
    return figures


CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# tiny

A Llama of {blocks} blocks, width {width} and {parameters:,} parameters that writes Python, small
enough to ship with weightshare and to fold, tune and audit in seconds on a CPU. It knows nothing
but the standard library's sources; it is for trying methods, not for use.

- Text: Python's standard library, {train_bytes:,} bytes in {train_documents} files (PSF licence,
  Copyright (c) 2001 Python Software Foundation; All Rights Reserved), without the files of the
  held-out sample. Weights: Apache-2.0.
- Tokenizer: byte-level BPE of {vocabulary} tokens, trained on the same text.
- Training: {steps} steps of {batch} x {length} tokens in {seconds} s on {device}; validation
  documents chose step {best_step}.

| held-out text, {heldout_bytes:,} bytes | bits per byte |
|---|---|
| this model, windows of {length} tokens, no overlap | {bits_per_byte:.3f} |
| this model, at least half a window of context | {bits_per_byte_half_window_of_context:.3f} |
| xz -9e | {xz_9e_bits_per_byte:.3f} |

Loss {loss:.4f} +- {loss_stderr:.4f} nats per token (perplexity {perplexity:.2f}), as stored in
bfloat16, computed in float32.

```
python examples/write_corpus.py corpus{tests}
{command}
```
"""


def write_card(options: argparse.Namespace, figures: dict) -> None:
    corpus = Path(options.text[0]).parent / "corpus.json"
    facts = json.loads(corpus.read_text()) if corpus.exists() else {}
    values = vars(options) | figures
    values["train_bytes"] = figures["train"]["bytes"]
    values["train_documents"] = figures["train"]["documents"]
    values["tests"] = " --tests" if facts.get("tests") else ""
    card = CARD.format(**values)
    if facts:
        card += f"\nThe corpus was gathered from Python {facts['python']}; sha256 of train.txt "
        card += f"`{facts['train']['sha256']}`, of heldout.txt `{facts['heldout']['sha256']}`.\n"
    (options.out / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
