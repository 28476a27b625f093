"""TRL's trainers over rewritten models, with their defaults: what they do with PEFT's model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_oracle import peft_model
from tiny_models import tiny_model
from tiny_tokenizers import tiny_tokenizer
from traces import fresh_trace

from gralora_fx import GraloraConfig, GraloraModel, rewrite
from gralora_fx.errors import RewriteError
from gralora_fx.peft import PeftModel, get_peft_model
from tests.architectures.tiny_decoders import tiny_decoder

pytestmark = [
    pytest.mark.usefixtures("own_garbage"),
    pytest.mark.filterwarnings(r"ignore:.*gradient_checkpointing\w*. is deprecated:FutureWarning"),  # TRL calls it
    pytest.mark.filterwarnings("ignore:.*padding-free training:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
    ),  # in torch.compile
    pytest.mark.filterwarnings("ignore:.*should not be instantiated. Methods on autograd functions:DeprecationWarning"),
]

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}{% else %}A:{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
TEXTS = [{"input_ids": [5 + (row * step) % 60 for step in range(4 + row % 3)]} for row in range(1, 9)]
CHATS = [
    {"messages": [{"role": "user", "content": "ab" * n}, {"role": "assistant", "content": "cd" * n}]}
    for n in range(1, 5)
]
PAIRS = [{"prompt": "ab" * n, "chosen": "cd" * n, "rejected": "ef" * (n % 3 + 1)} for n in range(1, 9)]
LORA = {"method": "LORA", "lora_alpha": 8, "lora_dropout": 0.3}
GRALORA = {"gralora_k": 2, "alpha": 8, "gralora_dropout": 0.3}
CALL = [70, 71]
LOGGED = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "rewards/margins", "logps/chosen", "reward", "kl")


def pair(directory: Path, **fields: Any) -> tuple[PeftModel, peft.PeftModel]:
    """Models of ours and of PEFT's with the same adapter, ready to train."""
    base = tiny_model("llama", num_hidden_layers=1)
    ours = copy.deepcopy(base)
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **(fields or GRALORA)}
    theirs = peft_model(base, **settings).train()
    theirs.save_pretrained(str(directory))
    return PeftModel.from_pretrained(ours, directory, is_trainable=True), theirs


def trained(kind: str, model: Any, directory: Path, rows: Any, **settings: Any) -> Any:
    """Return a trainer of TRL's that has run three steps."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    fixed = {"max_steps": 3, "logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True}
    rewards = {"reward_funcs": lambda completions, **_: [float(len(set(text))) for text in completions]}
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        args=getattr(trl, f"{kind}Config")(str(directory), learning_rate=1e-2, **{**fixed, **settings}),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        **(rewards if kind == "GRPO" else {}),
    )
    trainer.train()
    return trainer


def logged(trainer: Any) -> list[float]:
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 3
    return [entry[name] for entry in steps for name in LOGGED if name in entry]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"alora_invocation_tokens": CALL},
        {"assistant_only_loss": True},
        {"loss_type": "dft"},
        {"packing": True, "max_length": 16},
        {"padding_free": True, "max_length": None, "gradient_checkpointing": False},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=["default", "activated", "assistant_only_loss", "dft", "packing", "padding_free", "torch_compile"],
)
def test_sft_with_its_defaults_trains_as_with_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    rows, fields = CHATS if "assistant_only_loss" in settings else TEXTS, {}
    if call := settings.pop("alora_invocation_tokens", None):  # of a model, whose rows have it in their middle
        rows = [{"input_ids": [*row["input_ids"][:2], *call, *row["input_ids"][2:]]} for row in TEXTS]
        fields = {**LORA, "lora_dropout": 0, "alora_invocation_tokens": call}  # PEFT draws for these tokens alone
    mine, theirs = (
        trained("SFT", model, tmp_path / str(index), rows, **settings)
        for index, model in enumerate(pair(tmp_path / "adapter", **fields))
    )
    assert logged(mine) == pytest.approx(logged(theirs), rel=1e-5, abs=1e-6)
    assert mine.model.is_gradient_checkpointing is settings.get("gradient_checkpointing", True)


@pytest.mark.parametrize("kind", ["DPO", "KTO", "GRPO"])
def test_trainers_with_a_reference_adapter_train_as_with_peft(kind: str, tmp_path: Path) -> None:
    """With LoRA, since TRL copies no tensor of PEFT's GraLoRA into the reference: its names end with the adapter's."""
    rows, settings = PAIRS, {}
    if kind == "GRPO":
        rows = [{"prompt": row["prompt"]} for row in PAIRS]
        settings = {"max_completion_length": 6, "num_generations": 4, "per_device_train_batch_size": 4, "beta": 0.1}
    elif kind == "KTO":
        rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": n % 2 == 0} for n, r in enumerate(PAIRS)]
    mine, theirs = (
        trained(kind, model, tmp_path / str(index), rows, **settings)
        for index, model in enumerate(pair(tmp_path / "adapter", **LORA))
    )
    assert logged(mine) == pytest.approx(logged(theirs), rel=1e-5, abs=1e-6)
    assert mine.model.active_adapters == ["default"]
    assert sorted(mine.model.configs) == ["default", "ref"]


def test_a_trained_gralora_is_its_own_reference(tmp_path: Path) -> None:
    model, _ = pair(tmp_path / "adapter")
    assert model.dropout.p == 0.3
    trainer = trained("DPO", model, tmp_path, PAIRS, max_steps=3)
    assert model.dropout.p == 0  # by TRL's disable_dropout
    first, *_, last = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert (first["rewards/margins"], last["rewards/margins"] > 0) == (0, True)


def test_a_head_with_an_adapter_has_no_loss_from_its_own_weight(tmp_path: Path) -> None:
    model = get_peft_model(
        tiny_model("llama", num_hidden_layers=1), GraloraConfig(r=4, gralora_k=1, target_modules=["lm_head"])
    )
    with pytest.raises(RewriteError, match=r"take lm_head out of target_modules, or train it whole with modules_to_sa"):
        trained("SFT", model, tmp_path, TEXTS)


def test_a_head_that_trains_whole_is_the_one_of_the_loss(tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    model = get_peft_model(
        tiny_model("llama", num_hidden_layers=1),
        GraloraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    )
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
        hidden = model.base_model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        head = model.get_output_embeddings()
        expected = model(input_ids=ids).logits
    assert torch.allclose(torch.nn.functional.linear(hidden, head.weight), expected, atol=1e-6)
    assert [name for name, p in model.named_parameters() if p is head.weight] == [
        "graph_module.gralora.default.lm_head.weight"
    ]


def test_tags_are_kept_once_and_reach_the_card_that_peft_writes(tmp_path: Path) -> None:
    model = rewrite(fresh_trace("llama", num_hidden_layers=1), GraloraConfig(r=4, target_modules="all-linear"))
    assert model.model_tags is None
    model.add_model_tags(["trl", "sft"])
    model.add_model_tags("trl")
    assert model.model_tags == ["trl", "sft"]
    model.create_or_update_model_card(str(tmp_path))  # type: ignore[operator]  # PEFT's
    assert "\n- sft\n" in (tmp_path / "README.md").read_text()


# -- rows that hold several texts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_packed_rows_are_their_texts_apart(name: str) -> None:
    """Packed rows of Gemma, with a window of 3 positions, shorter than the texts."""
    sizes = {"sliding_window": 3} if name == "gemma3" else {}
    model = get_peft_model(tiny_model(name, **sizes), GraloraConfig(r=4, target_modules=["q_proj"], init_weights=False))
    texts = [torch.arange(5, 5 + length).unsqueeze(0) for length in (5, 2, 4)]
    packed = {
        "use_cache": False,
        "input_ids": torch.cat(texts, 1),
        "position_ids": torch.cat([torch.arange(t.shape[1]) for t in texts])[None],
    }
    apart = torch.cat([model(input_ids=text).logits for text in texts], 1)
    assert torch.allclose(model(**packed).logits, apart, atol=1e-6)
    assert torch.allclose(tiny_model(name, **sizes)(**packed).logits, model_without(model, packed), atol=1e-5)


def model_without(model: PeftModel, inputs: dict[str, Any]) -> torch.Tensor:
    with model.disable_adapter():
        logits: torch.Tensor = model(**inputs).logits
    return logits


def test_packed_rows_are_refused_where_texts_would_meet() -> None:
    plain = rewrite(fresh_trace("llama", num_hidden_layers=1), GraloraConfig(r=4, target_modules="all-linear"))
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(RewriteError, match="text-generation-with-past"):
        plain(input_ids=ids, cu_seq_lens_q=[0, 3])
    model = get_peft_model(tiny_decoder("FalconH1ForCausalLM"), GraloraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(RewriteError, match="packing=False"):
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 0]]), use_cache=False)
    cached = get_peft_model(tiny_model("llama"), GraloraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(RewriteError, match="position_ids that start again"):
        cached(input_ids=ids, cu_seq_lens_q=[0, 3], attention_mask=torch.ones_like(ids))


def test_a_graph_without_its_cache_keeps_no_keys_for_it() -> None:
    model = get_peft_model(tiny_model("llama"), GraloraConfig(r=4, target_modules=["q_proj"])).train()
    ids = torch.tensor([[5, 6, 7]])
    assert "cache" in model(input_ids=ids)
    assert [*model(input_ids=ids, use_cache=False)] == ["logits"]
    assert [*model(input_ids=ids, labels=ids)] == ["loss", "logits"]
    assert isinstance(model, GraloraModel)
