# ruff: noqa: E501
"""Run PEFT's own test suite with rows for Mixture of Shards added, offline.

    python tests/shards/peft_suite.py peft-0.21.2.tar.gz [--only custom] [--peers]

Takes the source distribution of the installed PEFT release (``pip download peft==... --no-deps
--no-binary :all:``), copies its tests, inserts our rows into its matrices and runs them on tiny
models made here under the names that PEFT uses. It needs the packages parameterized, datasets and
diffusers besides. Ends with the counts, and with status 1 where a test failed, or was skipped for
MoS but for neither VB-LoRA nor UniLoRA in the same test.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

IMPORT = "from weightshare.shards import MosConfig\n"
SMALL = '"target_modules": None, "shards_per_vector": 2, "lora_dropout": 0.05'
CUSTOM = [
    '("Vanilla MLP 1 MosRow", "MLP", MosConfig, {"target_modules": "lin0", "shards_per_vector": 2})',
    '("Vanilla MLP 2 MosRow", "MLP", MosConfig, {"target_modules": ["lin0"], "shards_per_vector": 1})',
    '("Vanilla MLP 3 MosRow", "MLP", MosConfig, {"target_modules": ["lin1"], "shards_per_vector": 2})',
    '("Vanilla MLP 4 MosRow", "MLP", MosConfig, {"target_modules": ["lin0", "lin1"], '
    '"shards_per_vector": 2, "private_rank": 1})',
    '("Vanilla MLP 5 MosRow", "MLP", MosConfig, {"target_modules": ["lin0"], '
    '"modules_to_save": ["lin1"], "shards_per_vector": 2})',
    '("Embedding + transformers Conv1D 1 MosRow", "EmbConv1D", MosConfig, '
    '{"target_modules": ["conv1d"], "shards_per_vector": 1})',
]
PAIR = (
    '("MosRow {0}", "mos", MosConfig, '
    '{{"target_modules": ["lin0"], "shards_per_vector": 2, "init_weights": False}}, '
    '{{"target_modules": ["{1}"], "shards_per_vector": 2, "init_weights": False}})'
)
MIXED = (
    '("MosRow mixed adapter", '
    'MosConfig(target_modules=["lin0"], shards_per_vector=2, init_weights=False), '
    'MosConfig(target_modules=["lin0"], shards_per_vector=2, equivalent_rank=4, '
    "init_weights=False))"
)
ROWS = {
    "test_custom_models.py": {
        "TEST_CASES = [": CUSTOM,
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = [": [
            PAIR.format("Same", "lin0"),
            PAIR.format("Different", "lin1"),
        ],
        "MIXED_ADAPTER_TEST_CASES = [": [MIXED],
    },
    "test_decoder_models.py": {
        "ALL_CONFIGS = [": [f'(MosConfig, {{"task_type": "CAUSAL_LM", {SMALL}}})']
    },
    "test_encoder_decoder_models.py": {
        "ALL_CONFIGS = [": [f'(MosConfig, {{"task_type": "SEQ_2_SEQ_LM", {SMALL}}})']
    },
    "test_feature_extraction_models.py": {
        "ALL_CONFIGS = [": [f'(MosConfig, {{"task_type": "FEATURE_EXTRACTION", {SMALL}}})']
    },
    "test_seq_classifier.py": {
        "ALL_CONFIGS = [": [f'(MosConfig, {{"task_type": "SEQ_CLS", {SMALL}}})']
    },
    "test_config.py": {"ALL_CONFIG_CLASSES = (": ["(MosConfig, {})"]},
}
CONFTEST = """
def pytest_addoption(parser):
    parser.addoption("--regression", action="store_true", default=False)

def pytest_configure(config):
    config.addinivalue_line("markers", "regression: not run here")
"""
MINE, PEERS = re.compile("MosRow|MosConfig"), re.compile("VBLoRA|UniLora")


def prepare(archive: Path, work: Path) -> Path:
    """Unpack PEFT's tests with our rows in them; returns their folder."""
    with tarfile.open(archive) as tar:
        tar.extractall(work, filter="data")
    tests = next(work.glob("peft-*/tests"))
    (tests / "__init__.py").touch()
    (tests / "conftest.py").write_text(CONFTEST)
    for name, lists in ROWS.items():
        text = (tests / name).read_text()
        text = text.replace("\nfrom .testing_", f"\n{IMPORT}from .testing_", 1)
        if IMPORT not in text:
            text = text.replace("\nfrom peft import", f"\n{IMPORT}from peft import", 1)
        for start, rows in lists.items():
            if rows:
                assert f"\n{start}" in text, f"{name} has no {start}"
                text = text.replace(
                    f"\n{start}", f"\n{start}\n" + "".join(f"    {r},\n" for r in rows), 1
                )
        (tests / name).write_text(text)
    # PEFT leaves methods with shared weights out of one check by name.
    common = tests / "testing_common.py"
    text = common.read_text()
    known = "if config_cls in (VBLoRAConfig, VeraConfig, UniLoraConfig):"
    assert known in text, "the check that names the sharing methods has moved"
    text = text.replace(known, known.replace("UniLoraConfig", "UniLoraConfig, MosConfig"))
    common.write_text(text.replace("\nfrom peft import", f"\n{IMPORT}from peft import", 1))
    return tests


def make_models(folder: Path) -> None:
    """Tiny random models saved under the names of the hub that the tests load them by."""
    import torch
    import transformers as t
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    words = {f"w{i}": i for i in range(90)} | {"<pad>": 90, "<s>": 91, "</s>": 92, "<unk>": 93}
    words |= {chr(97 + i): 94 + i for i in range(6)}
    bare = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=bare,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    ids = {"pad_token_id": 90, "bos_token_id": 91, "eos_token_id": 92}
    small = {"vocab_size": 100, **ids}
    deep = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16}
    llama = {**small, **deep, "intermediate_size": 32, "num_key_value_heads": 2}
    gpt = {**small, "n_embd": 32, "n_layer": 5, "n_head": 4}
    opt = t.OPTConfig(
        **small, **deep, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=128
    )
    made = {
        "peft-internal-testing/tiny-random-OPTForCausalLM": t.OPTForCausalLM(opt),
        "peft-internal-testing/tiny-random-GPT2LMHeadModel": t.GPT2LMHeadModel(t.GPT2Config(**gpt)),
        "hf-internal-testing/tiny-random-gpt2": t.GPT2LMHeadModel(t.GPT2Config(**gpt)),
        "peft-internal-testing/tiny-random-GPTJForCausalLM": t.GPTJForCausalLM(
            t.GPTJConfig(**gpt, rotary_dim=4)
        ),
        "trl-internal-testing/tiny-random-LlamaForCausalLM": t.LlamaForCausalLM(
            t.LlamaConfig(**llama)
        ),
        "hf-internal-testing/tiny-random-MistralForCausalLM": t.MistralForCausalLM(
            t.MistralConfig(**llama)
        ),
        "peft-internal-testing/tiny-dummy-qwen2": t.Qwen2ForCausalLM(t.Qwen2Config(**llama)),
        "hf-internal-testing/tiny-random-Gemma3ForCausalLM": t.Gemma3ForCausalLM(
            t.Gemma3TextConfig(**llama, head_dim=8)
        ),
    }
    seq = {"vocab_size": 100, "d_model": 16, **ids}
    bart = t.BartConfig(
        **seq, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32,
        decoder_start_token_id=92, max_position_embeddings=128,
    )  # fmt: skip
    t5 = t.T5Config(
        **seq, d_kv=4, d_ff=32, num_layers=5, num_decoder_layers=5, num_heads=4,
        decoder_start_token_id=90,
    )  # fmt: skip
    bert = {**small, **deep, "intermediate_size": 32, "max_position_embeddings": 128}
    made |= {
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": t.T5ForConditionalGeneration(t5),
        "peft-internal-testing/tiny-random-BartForConditionalGeneration": t.BartForConditionalGeneration(bart),
        "peft-internal-testing/tiny-random-BertModel": t.BertModel(t.BertConfig(**bert)),
        "peft-internal-testing/tiny-random-RobertaModel": t.RobertaModel(t.RobertaConfig(**bert)),
        "peft-internal-testing/tiny-random-DebertaModel": t.DebertaModel(t.DebertaConfig(**bert)),
        "peft-internal-testing/tiny-random-DebertaV2Model": t.DebertaV2Model(t.DebertaV2Config(**bert)),
        "peft-internal-testing/tiny-random-BertForSequenceClassification":
            t.BertForSequenceClassification(t.BertConfig(**bert)),
        "peft-internal-testing/tiny-random-RobertaForSequenceClassification":
            t.RobertaForSequenceClassification(t.RobertaConfig(**bert)),
        "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2":
            t.LlamaForSequenceClassification(t.LlamaConfig(**llama)),
    }  # fmt: skip
    LoraConfig().save_pretrained(folder / "peft-internal-testing/tiny-opt-lora-revision")
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def outcomes(report: Path) -> Iterable[tuple[str, str, str]]:
    """(test function, whole name, outcome) of every case in a JUnit report."""
    for case in ET.parse(report).iter("testcase"):
        name = case.get("name", "")
        kinds = {child.tag for child in case}
        outcome = "passed"
        if kinds & {"failure", "error"}:
            outcome = "failed"
        elif "skipped" in kinds:
            outcome = "skipped"
        yield f"{case.get('classname')}.{name.partition('[')[0]}", name, outcome


def main() -> int:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path, help="source distribution of PEFT")
    parser.add_argument("--only", default="", help="files whose name holds this word")
    parser.add_argument("--keep", type=Path, help="folder to work in, kept")
    options = parser.parse_args()
    work = options.keep or Path(tempfile.mkdtemp(prefix="peft-suite-"))
    work.mkdir(parents=True, exist_ok=True)
    tests = prepare(options.archive, work)
    make_models(tests.parent)
    names = [name for name in ROWS if options.only in name]
    report = work / "report.xml"
    chosen = "MosRow or MosConfig or VBLoRA or UniLora"
    command = [
        sys.executable, "-m", "pytest", *(f"tests/{n}" for n in names), "-q", "-k", chosen,
        "-o", "addopts=", "-o", "filterwarnings=", "-p", "no:cacheprovider",
        "-p", "weightshare.shards", f"--junitxml={report}", "--tb=short",
    ]  # fmt: skip
    subprocess.run(command, cwd=tests.parent, check=False, timeout=3000)
    counts: dict[str, Counter[str]] = {"MoS": Counter(), "VB-LoRA, UniLoRA": Counter()}
    skipped: dict[str, list[str]] = defaultdict(list)
    excused = set()
    failed = []
    for function, name, outcome in outcomes(report):
        if MINE.search(name):
            counts["MoS"][outcome] += 1
            if outcome == "skipped":
                skipped[function].append(name)
            elif outcome == "failed":
                failed.append(f"{function}: {name}")
        elif PEERS.search(name):
            counts["VB-LoRA, UniLoRA"][outcome] += 1
            if outcome == "skipped":
                excused.add(function)
    for method, found in counts.items():
        print(
            f"{method}: {found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped"
        )
    alone = {function: names for function, names in skipped.items() if function not in excused}
    for function, cases in alone.items():
        print(f"skipped for MoS alone: {function} ({len(cases)})")
    for line in failed:
        print(f"failed: {line}")
    return 1 if failed or alone or not counts["MoS"]["passed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
