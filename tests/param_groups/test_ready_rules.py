"""The rules that come with the package, on models of the kinds they are made for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from optfactory import build_optimizer, list_optimizers, list_rules, ready_rules, resolve
from optfactory.errors import ConfigError
from optfactory.rules.resources import data_dir
from tests.param_groups.harness import Net, built, got, labels, marked

DEPTH = 3


def llama(tied: bool = False) -> nn.Module:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": DEPTH}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=16, **sizes, **heads, tie_word_embeddings=tied)
    return LlamaForCausalLM(config)


def vit() -> nn.Module:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": DEPTH}
    config = ViTConfig(**sizes, num_attention_heads=2, image_size=8, patch_size=4, num_labels=3)
    return ViTForImageClassification(config)


class Timm(nn.Module):
    """Parameters under the names that timm's vision transformers have."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
        self.reg_token = nn.Parameter(torch.zeros(1, 4, 8))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 8, 4)})
        self.blocks = nn.Sequential(*(TimmBlock() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "pos_embed", "reg_token", "dist_token"}


class TimmBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(8)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(8, 8), "fc2": nn.Linear(8, 8)})


MODELS = {
    "embeddings_32bit": [Net, llama],
    "llama": [llama, lambda: llama(tied=True), Net],
    "no_decay_1d": [Net, llama, vit, Timm],
    "vit_layer_decay": [Timm, vit, Net],
}


def test_every_file_is_tried() -> None:
    assert sorted(MODELS) == list_rules()


@pytest.mark.parametrize("rules", sorted(MODELS))
def test_every_name_takes_the_rules_and_builds_on_a_fitting_model(rules: str) -> None:
    for make in MODELS[rules]:
        model = make()
        count = sum(1 for _ in model.parameters())
        for name in list_optimizers():
            optimizer = build_optimizer(name, model, param_groups=ready_rules(rules))
            assert sum(len(group["params"]) for group in optimizer.param_groups) == count
            assert resolve(optimizer.config.model_dump(mode="json")) == optimizer.config


@pytest.mark.parametrize("rules", sorted(MODELS))
def test_the_files_hold_what_the_function_returns(rules: str) -> None:
    path = data_dir("configs") / "optimizer" / "param_groups" / f"{rules}.yaml"
    assert yaml.safe_load(path.read_text()) == ready_rules(rules)


def test_what_is_returned_may_be_edited() -> None:
    rules = ready_rules("llama", "no_decay_1d")
    rules["no_decay"]["weight_decay"] = 9
    del rules["head"]
    assert ready_rules("llama")["no_decay"] == {"ndim": "<=1", "weight_decay": 0.0}
    assert "head" in ready_rules("llama")


def test_rules_of_several_names_follow_one_another() -> None:
    assert ready_rules() == {}
    found = ready_rules("no_decay_1d", "embeddings_32bit")
    assert list(found) == ["no_decay", "embeddings"]
    with pytest.raises(ConfigError, match=r"'lama'.*llama"):
        ready_rules("lama")


def test_norms_and_biases_have_no_decay() -> None:
    for make in MODELS["no_decay_1d"]:
        model = make()
        decay = got(built(model, ready_rules("no_decay_1d"), weight_decay=0.5), "weight_decay")
        for name, p in model.named_parameters():
            assert decay[name] == (0.0 if p.ndim <= 1 else 0.5), name


@pytest.mark.parametrize("tied", [False, True])
def test_llamas_embeddings_and_head_have_32_bits(tied: bool) -> None:
    bits = got(built(llama(tied), ready_rules("llama"), "adamw8bit"), "optim_bits")
    wide = {"model.embed_tokens.weight", "lm_head.weight"}
    assert {name for name, width in bits.items() if width == 32} == wide & set(bits)
    assert ("lm_head.weight" in bits) is not tied


def effective(model: nn.Module) -> dict[str, tuple[Any, Any]]:
    optimizer = built(model, ready_rules("vit_layer_decay"), lr=1.0, weight_decay=0.5)
    return {
        name: (lr, got(optimizer, "weight_decay")[name])
        for name, lr in got(optimizer, "lr").items()
    }


@pytest.mark.parametrize(
    ("make", "blocks", "tokens"),
    [
        (Timm, "blocks", {"cls_token", "pos_embed", "reg_token"}),
        (vit, "vit.layers", {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}),
    ],
)
def test_vision_transformers_decay_by_layer(make: Any, blocks: str, tokens: set[str]) -> None:
    model = make()
    found = effective(model)
    before = {name for name in found if "embed" in name or name in tokens}
    assert before >= tokens
    for name, p in model.named_parameters():
        layer = 0 if name in before else DEPTH + 1
        if name.startswith(f"{blocks}."):
            layer = 1 + int(name.removeprefix(f"{blocks}.").split(".")[0])
        lr, decay = found[name]
        assert lr == pytest.approx(0.75 ** (DEPTH + 1 - layer)), name
        assert decay == (0.0 if p.ndim <= 1 or name in tokens else 0.5), name


def test_what_a_model_lists_is_taken_from_it() -> None:
    listed = {"cls_token", "pos_embed", "reg_token"}
    assert marked(Timm(), {"listed_by": "no_weight_decay"}) == listed
    optimizer = built(Timm(), ready_rules("vit_layer_decay"))
    assert "tokens+listed+layers[0]" in labels(optimizer)
