"""Which parameters are hidden matrices: of real kinds of models, with reasons for all others."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from optfactory import Optimizer2State, build_optimizer, plan, resolve
from optfactory.catalog.files import render
from optfactory.errors import ConfigError
from tests.param_groups.harness import Net, built, got, marked, names_of, problems

VECTORS = "a vector"


def hidden(params: Any, **asked: Any) -> set[str]:
    """The names of what Muon trains."""
    optimizer = build_optimizer("muon", params, **asked)
    return {name for name, kind in got(optimizer, "optimizer").items() if kind == "muon"}


def reasons(model: nn.Module, **asked: Any) -> dict[str, str]:
    """Why parameters of two and more dimensions are not trained by Muon, as the plan says."""
    planned = plan("muon", model, **asked)
    return {
        name: why
        for group in planned.groups
        for name, why in zip(group.parameters, group.reasons, strict=False)
        if why and why != VECTORS
    }


def linear(*sizes: int) -> list[nn.Module]:
    return [nn.Linear(a, b) for a, b in pairwise(sizes)]


class Vit(nn.Module):
    """Patches by a convolution, tokens and positions that are plain parameters."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.reg_token = nn.Parameter(torch.zeros(1, 4, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 16, batch_first=True) for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)


class Experts(nn.Module):
    """Experts as stacks of matrices, and a router."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(20, 8)
        self.router = nn.Linear(8, 4, bias=False)
        self.up = nn.Parameter(torch.zeros(4, 8, 16))
        self.down = nn.Parameter(torch.zeros(4, 16, 8))
        self.lm_head = nn.Linear(8, 20, bias=False)


class Convolutions(nn.Module):
    """As image classifiers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.layers = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Conv1d(4, 6, 3))
        self.fc = nn.Linear(16, 10)


BLOCK = {"blocks.0.mix.weight", "blocks.1.mix.weight"}


def test_a_language_model() -> None:
    assert hidden(Net()) == BLOCK
    found = reasons(Net())
    assert found == {"embed.weight": "an embedding", "head.weight": "the output head"}


def test_a_tied_head_is_an_embedding() -> None:
    assert hidden(Net(tied=True)) == BLOCK
    assert reasons(Net(tied=True)) == {"embed.weight": "tied to an embedding"}


def test_names_alone_tell_embeddings_and_heads() -> None:
    assert hidden(list(Net().named_parameters())) == BLOCK
    wrapped = [(f"module.{name}", p) for name, p in Net().named_parameters()]
    assert hidden(wrapped) == {f"module.{name}" for name in BLOCK}


def test_a_stack_of_layers_ends_with_a_head() -> None:
    model = nn.Sequential(*linear(8, 16, 16, 4))
    assert hidden(model) == {"0.weight", "1.weight"}
    assert reasons(model) == {"2.weight": "the output head"}
    assert hidden(nn.Linear(8, 4)) == set()


def test_blocks_without_a_head_are_all_hidden() -> None:
    blocks = Net(depth=3).blocks
    assert hidden(blocks) == {name for name in names_of(blocks) if name.endswith("mix.weight")}


def test_vision_transformers() -> None:
    model = Vit()
    expected = {
        f"blocks.{n}.{part}"
        for n in range(2)
        for part in (
            "self_attn.in_proj_weight",
            "self_attn.out_proj.weight",
            "linear1.weight",
            "linear2.weight",
        )
    }
    assert hidden(model) == expected
    found = reasons(model)
    assert found["pos_embed"] == found["patch_embed.proj.weight"] == "an embedding, by its name"
    assert found["head.weight"] == "the output head"
    assert found["reg_token"] == "an embedding, by its name"


def test_experts_are_stacks() -> None:
    assert hidden(Experts()) == {"router.weight", "up", "down"}


def test_convolutions_on_request() -> None:
    assert hidden(Convolutions()) == set()
    found = reasons(Convolutions())
    assert found["stem.weight"] == "a convolution, which flatten: true takes for a matrix"
    assert found["layers.2.weight"] == found["stem.weight"]
    kernels = {"stem.weight", "layers.0.weight", "layers.2.weight"}
    assert hidden(Convolutions(), flatten=True) == kernels


def test_a_rule_may_flatten_some() -> None:
    rules = {
        "late": {"match": "layers.*", "ndim": ">2", "optimizer": "muon", "flatten": True},
    }
    assert hidden(Convolutions(), param_groups=rules) == {"layers.0.weight", "layers.2.weight"}


def _transformers(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
    wide = {**small, "intermediate_size": 32}
    made: dict[str, Any] = {
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=8)
        ),
        "llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**wide, num_key_value_heads=2)
        ),
        "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**wide)),
        "classifier": lambda: transformers.BertForSequenceClassification(
            transformers.BertConfig(**wide)
        ),
        "vit": lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**{k: v for k, v in wide.items() if k != "vocab_size"},
                                   image_size=8, patch_size=4)
        ),
    }  # fmt: skip
    model: nn.Module = made[kind]()
    return model


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        ("gpt2", {"transformer.wte.weight", "transformer.wpe.weight"}),
        ("llama", {"model.embed_tokens.weight", "lm_head.weight"}),
        (
            "bert",
            {f"bert.embeddings.{n}_embeddings.weight" for n in ("word", "position", "token_type")},
        ),
        (
            "classifier",
            {f"bert.embeddings.{n}_embeddings.weight" for n in ("word", "position", "token_type")}
            | {"classifier.weight"},
        ),
        ("vit", {"classifier.weight"}),
    ],
)
def test_models_of_hugging_face(kind: str, left_out: set[str]) -> None:
    model = _transformers(kind)
    matrices = {name for name, p in model.named_parameters() if p.ndim == 2}
    assert matrices - hidden(model) == left_out
    assert hidden(model) <= matrices


# ---- rules -------------------------------------------------------------------------------------


def test_any_optimizer_may_ask_for_hidden_matrices() -> None:
    assert marked(Net(), {"hidden": True}) == BLOCK
    assert marked(Net(), {"hidden": False}) == set(names_of(Net())) - BLOCK
    assert marked(Net(), {"hidden": False, "ndim": 2}) == {"embed.weight", "head.weight"}
    rules = {"matrices": {"hidden": True, "optimizer": "muon8bit", "momentum": 0.9}}
    kinds = got(built(Net(), rules, "adamw8bit"), "optimizer")
    assert {name for name, kind in kinds.items() if kind == "muon8bit"} == BLOCK
    with pytest.raises(ConfigError, match=r"param_groups\.rule\.hidden"):
        built(Net(), {"rule": {"hidden": "some", "lr": 0.1}})


def test_rules_stand_on_top_of_others() -> None:
    rules = {
        "head": {"match": "head.weight", "optimizer": "muon", "lr_scale": 0.5},
        "first": {"match": "blocks.0.*", "ndim": 2, "optimizer": "lion", "betas": [0.5, 0.5]},
        "vectors": {"ndim": 1, "weight_decay": 0.0},
    }
    optimizer = built(Net(), rules, "muon", lr=0.5, weight_decay=0.25, others={"lr": 0.125})
    kinds, rates = got(optimizer, "optimizer"), got(optimizer, "lr")
    # What others say is not for what a rule gives to an optimizer of its own.
    assert (kinds["head.weight"], rates["head.weight"]) == ("muon", 0.25)
    assert (kinds["blocks.0.mix.weight"], rates["blocks.0.mix.weight"]) == ("lion", 0.5)
    assert (kinds["embed.weight"], rates["embed.weight"]) == ("adamw", 0.125)
    assert kinds["blocks.1.mix.weight"] == "muon"
    decays = got(optimizer, "weight_decay")
    assert (decays["norm.weight"], decays["embed.weight"]) == (0.0, 0.25)


# ---- others ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("muon", "adamw"),
        ("muon8bit", "adamw8bit"),
        ("paged_muon", "paged_adamw"),
        ("paged_muon8bit", "paged_adamw8bit"),
        ("muon32bit", "adamw"),
    ],
)
def test_what_is_not_named_is_adamw_as_wide_as_the_name(name: str, others: str) -> None:
    kinds = got(build_optimizer(name, Net()), "optimizer")
    assert set(kinds.values()) == {name, others}


def of_embedding(optimizer: Optimizer2State, key: str) -> Any:
    """A hyperparameter of the embedding; families have keys of their own."""
    (group,) = [g for g in optimizer.param_groups if "embed.weight" in g["param_names"]]
    return group[key]


def test_others_rates_may_be_scaled_by_rules() -> None:
    rules = {"embed": {"match": "embed.*", "lr_scale": 0.5}}
    optimizer = built(Net(), rules, "muon", lr=0.5, others={"lr": 0.125})
    assert of_embedding(optimizer, "lr") == 0.0625
    assert got(optimizer, "lr")["head.weight"] == 0.125


def test_what_others_do_not_state_is_theirs_but_for_rate_and_decay() -> None:
    optimizer = build_optimizer("muon", Net(), lr=0.5, weight_decay=0.25, momentum=0.5)
    assert got(optimizer, "lr")["embed.weight"] == 0.5
    assert got(optimizer, "weight_decay")["embed.weight"] == 0.25
    assert of_embedding(optimizer, "betas") == (0.9, 0.999)
    own = {"name": "lion8bit", "betas": [0.5, 0.75], "weight_decay": 0.0}
    optimizer = build_optimizer("muon", Net(), others=own)
    assert set(got(optimizer, "optimizer").values()) == {"muon", "lion8bit"}
    assert of_embedding(optimizer, "betas") == (0.5, 0.75)
    assert of_embedding(optimizer, "weight_decay") == 0.0


@pytest.mark.parametrize(
    ("others", "problem"),
    [
        ({"name": "lyon"}, "optimizer.others.name: unknown optimizer 'lyon'"),
        ({"name": "muon8bit"}, "optimizer.others.name: 'muon8bit' trains matrices alone"),
        ({"momentum": 0.5}, "optimizer.others.momentum: unknown key"),
        ({"betas": [0.9]}, "optimizer.others.betas"),
        ({"name": "lion8bit", "optim_bits": 32}, "optimizer.others.optim_bits: 32 contradicts"),
        ("adamw8bit", "optimizer.others"),
    ],
    ids=str,
)
def test_others_are_checked(others: Any, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("muon", others=others)
    assert any(line.startswith(problem) for line in caught.value.problems), caught.value.problems
    with pytest.raises(ConfigError, match=r"others: unknown key"):
        resolve("adamw", others={"lr": 0.1})


def test_a_rule_may_not_be_called_as_what_others_make() -> None:
    rules = {"others": {"match": "*", "lr": 0.1}}
    (problem,) = problems(Net(), rules, "muon")
    assert problem == "param_groups.others: is what `others` makes; rename it"


def test_a_config_with_others_comes_back_from_every_form(tmp_path: Path) -> None:
    config = resolve("muon8bit", others={"name": "Lion_8bit", "betas": [0.5, 0.5]})
    assert config.others["name"] == "lion8bit"  # type: ignore[attr-defined]
    assert resolve(config.model_dump(mode="json")) == config
    file = tmp_path / "one.yaml"
    file.write_text(render(config))
    assert resolve(OmegaConf.create(file.read_text())) == config
    assert resolve("muon", others=None) == resolve("muon")


def test_hydra_sets_others(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir

    (tmp_path / "config.yaml").write_text(
        "hydra: {searchpath: ['pkg://optfactory.configs']}\ndefaults: [optimizer: adamw, _self_]\n"
    )
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        plain = compose("config", ["optimizer=muon8bit"])
        changed = compose(
            "config", ["optimizer=muon8bit", "+optimizer.others.name=lion8bit", "optimizer.lr=0.5"]
        )
    kinds = got(build_optimizer(plain.optimizer, Net()), "optimizer")
    assert set(kinds.values()) == {"muon8bit", "adamw8bit"}
    optimizer = build_optimizer(changed.optimizer, Net())
    assert set(got(optimizer, "optimizer").values()) == {"muon8bit", "lion8bit"}
    assert got(optimizer, "lr")["embed.weight"] == 0.5


# ---- the plan ----------------------------------------------------------------------------------


def test_the_plan_says_what_is_trained_by_what_and_why() -> None:
    text = str(plan("muon8bit", Net(width=64)))
    for told in ("an embedding", "the output head", "a vector", "adamw8bit", "scratch"):
        assert told in text


def test_bare_tensors_are_told_by_their_dimensions() -> None:
    tensors: list[Tensor] = [p.detach().requires_grad_() for p in Net().parameters()]
    with pytest.warns(UserWarning, match="the parameters have no names"):
        optimizer = build_optimizer("muon", tensors)
    kinds = {
        group["optimizer"]: {p.ndim for p in group["params"]} for group in optimizer.param_groups
    }
    assert kinds == {"muon": {2}, "adamw": {1}}
