"""Architectures of transformers with a norm, a rotary embedding, stochastic depth or attention of known code.

A model whose code is not recognised is traced all the same, into more nodes, so that a change in transformers would
pass unseen: here it fails, by name.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import transformers.models
from torch import nn

from gralora_fx.core.tracing.known_code import (
    ANGLES_OF_GRIDS,
    ATTENTIONS,
    DROP_PATH,
    RMS_NORM,
    ROTARY_EMBEDDING,
    Recognised,
)
from gralora_fx.features.states.recognised import (
    CAUSAL_CONV,
    DELTA_RULE,
    GATED_NORMS,
    KIMI_RULE,
    LIGHTNING,
    STATE_SPACES,
)

NORMS = """
    aimv2 apertus apertus1p5 arcee aria axk1 axk2 bailing_hybrid bamba bitnet blt chameleon clvp cohere2_moe
    cosmos3_edge csm cwm deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v32 deimv2 dia diffllama doge dots1
    dots3_note emu3 ernie4_5 ernie4_5_moe ernie4_5_vl_moe eurobert evolla exaone4 exaone4_5 exaone_moe falcon_h1
    falcon_mamba glm glm4 glm4_moe glm4_moe_lite glm4v glm4v_moe glm5_next glm_image glm_moe_dsa glm_ocr granite
    granite4_vision granite_docling granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared
    higgs_audio_v2 hunyuan_v1_dense hunyuan_v1_moe hunyuan_vl hy_v3 hy_v4 hy_v4_vl hyperclovax idefics2 idefics3
    inkling internvl jamba jetmoe kimi_linear kolibri1 laguna lfm2 lfm2_moe lfm3 lfm3_vl lighton_ocr llama
    longcat_flash mamba mamba2 mellum mimo_v2_flash minicpm3 minimax minimax_m2 ministral ministral3 mistral
    mistral3 mistral4 mistral_large4 mixtral mllama molmo2 muse_glimmer_assistant neucodec olmoe ovis2 paddleocr_vl
    pe_audio pe_audio_video pe_video phi3 phi4_multimodal pixtral qianfan_ocr qwen2 qwen2_5_omni qwen2_5_vl
    qwen2_moe qwen2_vl qwen3 qwen3_moe qwen3_omni_moe qwen3_vl qwen3_vl_moe sapiens2 seed_oss smollm3 solar_open
    timesfm timesfm2_5 ultrabert ultravbert unlimited_ocr vibevoice vibevoice_acoustic_tokenizer vibevoice_asr
    voxtral_realtime xcodec2 youtu zamba zamba2 zaya
"""
ROTARY_EMBEDDINGS = """
    afmoe apertus apertus1p5 arcee aria axk1 axk2 bitnet chameleon cohere_compass cosmos3_edge csm cwm dbrx
    deepseek_ocr2 deepseek_v3 deepseek_v32 dia diffllama doge dory dots1 embedding_gemma2 emu3 esmc esmfold2
    eurobert exaone4 exaone4_5 exaone_moe falcon falcon_h1 flint gemma gemma2 gemma3 glm4_moe_lite gpt_neox_japanese
    gradium_phonon_tts granite granite4_vision granite_docling granite_swa granitemoe granitemoe_swa
    granitemoehybrid granitemoeshared gte higgs_audio_v2 hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4
    hyperclovax idefics jais2 jamba jetmoe jina_embeddings_v3 kolibri1 kyutai_speech_to_text lara_mini lasr lfm2
    lfm2_moe llama mellum mimi minicpm3 minimax ministral ministral3 mistral mistral4 mixtral mllama molmo2 moshi
    muse_glimmer muse_spark nemotron_asr_streaming nemotron_h neucodec nomic_bert olmoe paddleocr_vl parakeet
    persimmon phi phimoe pixtral pocket_tts pocket_tts_audio_tokenizer qwen2 qwen2_5_omni qwen2_5_vl qwen2_moe
    qwen2_vl qwen3 qwen3_moe qwen3_omni_moe qwen3_vl qwen3_vl_moe seed_oss smollm3 solar_open stablelm starcoder2
    t5gemma t5gemma2 timesfm2_5 ultrabert unlimited_ocr vaultgemma voxtral_realtime xcodec2 youtu zamba2
"""
DROP_PATHS = """
    beit bit clap convnext convnextv2 cvt data2vec_vision dinat dinov2 dinov2_with_registers dinov3_convnext
    dinov3_vit donut_swin eomt eomt_dinov3 florence2 focalnet glpn grounding_dino hiera maskformer_swin mgp_str
    mm_grounding_dino pixio poolformer pvt pvt_v2 qianfan_ocr radio rf_detr sapiens2 segformer seggpt swiftformer
    swin swin2sr swinv2 timesformer tipsv2 videomt vitdet vjepa2 x_clip
"""
ATTENTION = "falcon"
ANGLES = """
    cosmos3_edge hy_v4_vl qwen3_5 qwen3_5_moe qwen3_omni_moe qwen3_vl qwen3_vl_moe qwen4_exp
"""
CAUSAL_CONVS = """
    bailing_hybrid bamba falcon_h1 falcon_mamba glm5_next granitemoehybrid inkling inkling2 inkling2_loop jamba
    kimi_linear lara_mini lfm2 lfm2_moe lfm3 mamba mamba2 nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_next
    qwen4_exp zamba zamba2
"""
DELTA_RULES = """
    bailing_hybrid glm5_next kimi_linear lara_mini olmo_hybrid qwen3_5 qwen3_5_moe qwen3_next qwen4_exp
"""
LIGHTNING_ATTENTION = "minimax"
SELECTIVE_SCANS = "falcon_mamba jamba mamba zamba"
STATE_SPACE_DUALITIES = "bamba falcon_h1 granitemoehybrid mamba2 nemotron_h zamba2"
GATED_NORMALISATIONS = """
    bailing_hybrid bamba glm5_next granitemoehybrid kimi_linear lara_mini mamba2 nemotron_h olmo_hybrid qwen3_5
    qwen3_5_moe qwen3_next qwen4_exp zamba2
"""

# in the source of what may be recognised
_TELLING = (
    "variance_epsilon",
    "apply_rotary_pos_emb",
    "DropPath",
    "FalconAttention",
    "causal_conv1d_fn",
    "recomposition_frequencies",
)


@cache
def modeling_modules() -> dict[str, ModuleType]:
    """Return transformers' modules that may have such code, by architecture, if their packages are here."""
    modules = {}
    for file in sorted(Path(transformers.models.__path__[0]).glob("*/modeling_*.py")):
        if any(word in file.read_text() for word in _TELLING):
            try:
                module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
            except ImportError:
                continue
            modules[file.stem.removeprefix("modeling_")] = module
    return modules


def own_classes(module: ModuleType) -> Iterator[type[nn.Module]]:
    """Yield the classes of `nn.Module` that a Python module defines."""
    for kind in vars(module).values():
        if inspect.isclass(kind) and issubclass(kind, nn.Module) and kind.__module__ == module.__name__:
            yield kind


def is_in(module: ModuleType, table: Sequence[Recognised]) -> bool:
    """Return whether a Python module has recognised code, as a function or in one of its classes."""
    classes = list(own_classes(module))
    return any(code.is_function_of(module) or any(map(code.is_method_of, classes)) for code in table)


@pytest.mark.parametrize(
    ("names", "table"),
    [
        (NORMS, [RMS_NORM]),
        (ROTARY_EMBEDDINGS, [ROTARY_EMBEDDING]),
        (ANGLES, [ANGLES_OF_GRIDS]),
        (DROP_PATHS, [DROP_PATH]),
        (ATTENTION, ATTENTIONS),
        (CAUSAL_CONVS, [CAUSAL_CONV]),
        (DELTA_RULES, [DELTA_RULE, KIMI_RULE]),
        (LIGHTNING_ATTENTION, [LIGHTNING]),
        (STATE_SPACE_DUALITIES, STATE_SPACES[:2]),
        (SELECTIVE_SCANS, STATE_SPACES[2:]),
        (GATED_NORMALISATIONS, GATED_NORMS),
    ],
    ids=[
        "norm",
        "rotary embedding",
        "angles of grids",
        "stochastic depth",
        "attention of a model's own",
        "causal convolution",
        "delta rule",
        "lightning attention",
        "state space duality",
        "selective scan",
        "norm with a gate",
    ],
)
def test_architectures_are_recognised(names: str, table: Sequence[Recognised]) -> None:
    known = set(names.split())
    recognised = {name for name, module in modeling_modules().items() if is_in(module, table)}
    lost, gained = sorted(known - recognised), sorted(recognised - known)
    assert not lost, (
        f"no longer recognised, so their traces are larger: {', '.join(lost)}; look at what changed in them"
    )
    assert not gained, f"recognised too: {', '.join(gained)}; add them to the list"
