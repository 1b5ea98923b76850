"""Hugging Face's Trainer: both ways in, clipping, accumulation, schedule, save and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from optfactory import build_optimizer, optim, optimizer_factory, ready_rules
from optfactory.errors import ConfigError, StateError
from tests.frameworks.harness import (
    CLASSES,
    NAMES,
    assert_close,
    assert_kept_as_named,
    rate_of,
    weights,
)

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")

VOCABULARY, LENGTH = 96, 8
STEPS, SAVED = 6, 4


class Tokens(torch.utils.data.Dataset):
    """A few random sequences that a model can learn by heart."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(VOCABULARY, (24, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def language_model(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def trainer(folder: Path, model: Any, **given: Any) -> Any:
    """A Trainer with everything on that touches an optimizer."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        learning_rate=0.01,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        logging_steps=1,
        save_steps=SAVED,
        optim=given.pop("optim", "adamw_torch"),
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return transformers.Trainer(model, arguments, train_dataset=Tokens(), **given)


def named(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Through `optimizers=`, with the Trainer's own schedule."""
    model = language_model(dtype)
    optimizer = build_optimizer(name, model, lr=rate_of(name), **options)
    return trainer(folder, model, optimizers=(optimizer, None))


def of_class(name: str, folder: Path) -> Any:
    """Through `optimizer_cls_and_kwargs=`; the Trainer makes groups with and without decay."""
    given = (CLASSES[name], {"lr": 0.01, "betas": (0.9, 0.95)})
    return trainer(folder, language_model(), optimizer_cls_and_kwargs=given)


def curve(run: Any) -> list[tuple[float, float]]:
    """Losses and gradient norms, as logged by the Trainer; a resumed run has the first part too."""
    return [(log["loss"], log["grad_norm"]) for log in run.state.log_history if "loss" in log]


def assert_resumes(whole: Any, resumed: Any, folder: Path) -> None:
    whole.train()
    losses = [loss for loss, _ in curve(whole)]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}"))
    assert curve(resumed) == curve(whole)
    assert weights(resumed.model) == weights(whole.model)


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_by_name_trains_and_resumes(name: str, tmp_path: Path) -> None:
    whole = named(name, tmp_path)
    resumed = named(name, tmp_path)
    assert_resumes(whole, resumed, tmp_path)
    assert_kept_as_named(resumed.optimizer, name)


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "PagedAdamW8bit", "LAMB8bit"])
def test_a_class_and_its_arguments_train_and_resume(name: str, tmp_path: Path) -> None:
    whole, resumed = of_class(name, tmp_path), of_class(name, tmp_path)
    assert_resumes(whole, resumed, tmp_path)
    assert_kept_as_named(resumed.optimizer, name)
    assert type(resumed.optimizer.optimizer) is CLASSES[name]
    assert [group["weight_decay"] for group in resumed.optimizer.param_groups] == [0.1, 0.0]
    assert {group["betas"] for group in resumed.optimizer.param_groups} == {(0.9, 0.95)}


@pytest.mark.parametrize("early", [True, False])
def test_a_factory_trains_and_resumes(early: bool, tmp_path: Path) -> None:
    # What is no class is called without arguments first, then with the model.
    config = {"name": "paged_adamw8bit", "lr": 0.01, "param_groups": ready_rules("no_decay_1d")}
    given = (optimizer_factory(**config), {}) if early else (optimizer_factory, config)
    whole, resumed = (
        trainer(tmp_path, language_model(), optimizer_cls_and_kwargs=given) for _ in range(2)
    )
    assert_resumes(whole, resumed, tmp_path)
    assert_kept_as_named(resumed.optimizer, "paged_adamw8bit")
    groups = [(group["name"], group["weight_decay"]) for group in resumed.optimizer.param_groups]
    assert groups == [("default", 0.01), ("no_decay", 0.0)]


def with_rules(name: str, folder: Path, model: Any) -> Any:
    """As examples/hf_trainer.py does it: by name, in the groups that the Trainer makes."""
    given = {"name": name, "lr": 0.01, "weight_decay": 0.1}
    rules = {"param_groups": ready_rules("no_decay_1d")}
    return trainer(folder, model, optimizer_cls_and_kwargs=(optimizer_factory, given | rules))


def of_kind(kind: str) -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    widths = {"vocab_size": VOCABULARY, "intermediate_size": 16}
    return {
        "llama": language_model,
        "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **widths)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=VOCABULARY)
        ),
    }[kind]()


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_the_ready_rule_makes_the_groups_that_the_trainer_makes(kind: str, tmp_path: Path) -> None:
    model = of_kind(kind)
    ours, theirs = with_rules("adamw8bit", tmp_path, model), trainer(tmp_path, model)
    found = [
        [([id(p) for p in group["params"]], group["weight_decay"]) for group in groups]
        for groups in (ours.create_optimizer().param_groups, theirs.create_optimizer().param_groups)
    ]
    assert found[0] == found[1]
    assert [decay for _, decay in found[0]] == [0.1, 0.0]


def test_build_optimizer_given_to_the_trainer_names_the_factory(tmp_path: Path) -> None:
    given = (build_optimizer, {"name": "adamw8bit"})
    run = trainer(tmp_path, language_model(), optimizer_cls_and_kwargs=given)
    with pytest.raises(ConfigError, match="or use optimizer_factory"):
        run.train()


def test_a_bfloat16_model_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, resumed = (
        named("adamw8bit", tmp_path, torch.bfloat16, param_rounding="stochastic", seed=3)
        for _ in range(2)
    )
    assert_resumes(whole, resumed, tmp_path)
    assert {p.dtype for p in resumed.model.parameters()} == {torch.bfloat16}


def test_an_own_schedule_beside_the_optimizer_is_used(tmp_path: Path) -> None:
    def run() -> Any:
        model = language_model()
        optimizer = build_optimizer("adamw8bit", model, lr=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=STEPS + 1)
        return trainer(tmp_path, model, optimizers=(optimizer, schedule))

    whole, resumed = run(), run()
    assert_resumes(whole, resumed, tmp_path)
    betas = [run.optimizer.param_groups[0]["betas"] for run in (whole, resumed)]
    assert betas[0] == betas[1]
    assert betas[0][0] > 0.94  # near the end of the cycle of betas, from 0.95 and back


def test_the_trainers_settings_act_as_on_torchs_adamw(tmp_path: Path) -> None:
    ours = trainer(tmp_path, language_model(), optimizer_cls_and_kwargs=(optim.AdamW, {"lr": 0.01}))
    theirs = trainer(tmp_path, language_model())
    for run in (ours, theirs):
        run.train()
    assert type(theirs.optimizer.optimizer) is torch.optim.AdamW
    for mine, expected in zip(curve(ours), curve(theirs), strict=True):
        assert mine == pytest.approx(expected, rel=1e-4)
    assert_close(ours.model, theirs.model, rtol=1e-3)


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "adamw", "paged_adamw8bit"])
def test_a_run_begun_with_torchs_adamw_goes_on_with_ours(name: str, tmp_path: Path) -> None:
    theirs = trainer(tmp_path, language_model())
    theirs.train()
    if name in CLASSES:
        given = (CLASSES[name], {"lr": 0.01})
        ours = trainer(tmp_path, language_model(), optimizer_cls_and_kwargs=given)
    else:
        ours = with_rules(name, tmp_path, language_model())
    ours.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))
    rel = 2e-2 if name.endswith("8bit") else 1e-4
    for mine, expected in zip(curve(ours), curve(theirs), strict=True):
        assert mine == pytest.approx(expected, rel=rel)
    assert_kept_as_named(ours.optimizer, name)


@pytest.mark.parametrize("paged", [False, True])
def test_the_arguments_that_the_trainer_gives_bitsandbytes_are_understood(
    paged: bool, tmp_path: Path
) -> None:
    # What Trainer passes for optim="adamw_8bit" and "paged_adamw_8bit".
    given = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "optim_bits": 8, "is_paged": paged}
    run = trainer(tmp_path, language_model(), optimizer_cls_and_kwargs=(optim.AdamW, given))
    run.train()
    assert_kept_as_named(run.optimizer, "paged_adamw8bit" if paged else "adamw8bit")


def test_the_embedding_may_stay_at_32_bits_and_resumes_so(tmp_path: Path) -> None:
    def run() -> Any:
        model = language_model()
        embedding = model.get_input_embeddings().weight
        rest = [p for p in model.parameters() if p is not embedding]
        groups = [{"params": [embedding], "optim_bits": 32}, {"params": rest}]
        optimizer = build_optimizer("adamw8bit", groups, lr=0.01)
        return trainer(tmp_path, model, optimizers=(optimizer, None))

    whole, resumed = run(), run()
    assert_resumes(whole, resumed, tmp_path)
    first, second, *_ = resumed.optimizer.state.values()
    assert "exp_avg" in first
    assert "exp_avg_q8" in second


def test_decay_of_training_arguments_for_adam_asks_which_one_is_meant(tmp_path: Path) -> None:
    # bitsandbytes' Adam8bit in this place would decay decoupled, torch's Adam by L2.
    given = (optim.Adam8bit, {"lr": 0.01})
    run = trainer(tmp_path, language_model(), optimizer_cls_and_kwargs=given)
    with pytest.raises(ConfigError, match=r"param_groups\[0\]\.weight_decay: 0\.1 means"):
        run.train()
    assert run.state.global_step == 0
    given[1]["adam_w_mode"] = True
    trainer(tmp_path, language_model(), optimizer_cls_and_kwargs=given).train()


@pytest.mark.parametrize("key", ["fused", "foreach", "momentum"])
def test_a_foreign_argument_stops_the_training_before_it_starts(key: str, tmp_path: Path) -> None:
    given = (optim.AdamW8bit, {"lr": 0.01, key: True})
    run = trainer(tmp_path, language_model(), optimizer_cls_and_kwargs=given)
    with pytest.raises(ConfigError, match=rf"'adamw8bit'[\s\S]*{key}: unknown key"):
        run.train()
    assert run.state.global_step == 0


def test_a_checkpoint_of_the_trainers_own_optimizer_loads_with_the_rule_of_the_hint(
    tmp_path: Path,
) -> None:
    run = trainer(tmp_path, language_model())
    run.train()
    theirs, model = run.optimizer.optimizer, run.model
    with pytest.raises(StateError, match="param_groups='no_decay_1d' makes groups of these sizes"):
        build_optimizer("adamw", model).load_state_dict(theirs.state_dict())
    ours = build_optimizer("adamw", model, param_groups="no_decay_1d")
    ours.load_state_dict(theirs.state_dict())
    for p in model.parameters():
        assert torch.equal(ours.state[p]["exp_avg"], theirs.state[p]["exp_avg"])
