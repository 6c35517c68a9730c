"""A report like that of a 135 M parameter model: 30 blocks of seven layers, fifteen measured choices each."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict

import pytest

from tersor.contracts import Choice as PlanChoice
from tersor.contracts import Layer, Plan, Quality, RatePoint, TensorFate
from tersor.report import Check, FileDigest, LayerReport, Note, ReportData, Sample, Stage, TextRecord

HIDDEN, MLP, VOCABULARY, BLOCKS, KEY = 576, 1536, 49152, 30, 192
KINDS = {
    "self_attn.q_proj": ((HIDDEN, HIDDEN), 0.034),
    "self_attn.k_proj": ((KEY, HIDDEN), 0.159),
    "self_attn.v_proj": ((KEY, HIDDEN), 0.487),
    "self_attn.o_proj": ((HIDDEN, HIDDEN), 0.022),
    "mlp.gate_proj": ((MLP, HIDDEN), 0.092),
    "mlp.up_proj": ((MLP, HIDDEN), 0.135),
    "mlp.down_proj": ((HIDDEN, MLP), 0.203),
}
CODECS = {
    "int2:g64:s8": (2, 64, 1.25),
    "lut2:row": (2, None, 0.95),
    "int2:g32:s8": (2, 32, 1.1),
    "int3:g64:s8": (3, 64, 1.1),
    "int3:g32:s8": (3, 32, 1.0),
    "lut3:row": (3, None, 0.85),
    "int4:g64:s8": (4, 64, 1.0),
    "fp4:e2m1:g32:s8": (4, 32, 1.15),
    "int4:g32:s8": (4, 32, 0.95),
    "lut4:row": (4, None, 0.8),
    "int5:g64:s8": (5, 64, 1.0),
    "int6:g64:s8": (6, 64, 1.0),
    "fp6:e2m3:g32:s8": (6, 32, 1.6),
    "int8:g64:s8": (8, 64, 1.0),
    "bf16": (16, None, 0.0),
}
LAYER_HEADER = 230
BUDGET = 67_265_138
TEXT_BEFORE = (
    "The tide is the regular rise and fall of the sea's surface, caused mainly by the pull of the Moon and, to a "
    "lesser extent, of the Sun. As the Earth turns, each coast passes through two bulges of water a day, so most "
    "places see two high tides and two low tides."
)
TEXT_AFTER = (
    "The tide is the regular rise and fall of the sea's surface, caused mainly by the gravity of the Moon. The water "
    "on the side that faces the Moon is pulled toward it, and a second bulge forms on the other side, so most coasts "
    "see two high tides and two low tides each day."
)


def stored_bytes(codec: str, shape: tuple[int, int]) -> int:
    bits, group, _ = CODECS[codec]
    rows, columns = shape
    if codec == "bf16":
        return 2 * rows * columns
    side = 2 * 2**bits if group is None else columns // group + 2
    return rows * (-(-columns * bits // 8) + side)


def curve_of(shape: tuple[int, int], loss_at_3_bits: float, rng: random.Random) -> tuple[RatePoint, ...]:
    points = []
    for codec, (bits, _, efficiency) in CODECS.items():
        loss = loss_at_3_bits * efficiency * 2 ** (-2 * (bits - 3)) * rng.uniform(0.93, 1.07)
        points.append(RatePoint(stored_bytes(codec, shape) + LAYER_HEADER, loss, codec))
    return tuple(points)


def layers_and_curves(rng: random.Random) -> list[tuple[Layer, tuple[RatePoint, ...]]]:
    embedding = Layer(
        "model.embed_tokens", "model.embed_tokens.weight", "embedding", (VOCABULARY, HIDDEN), None, "ids",
        tied=("lm_head.weight",),
    )  # fmt: skip
    found = [(embedding, curve_of(embedding.shape, 0.6, rng))]
    for block in range(BLOCKS):
        depth = 1.6 if block in (0, 1) else 1.25 if block >= BLOCKS - 2 else 0.9
        for kind, (shape, loss) in KINDS.items():
            name = f"model.layers.{block}.{kind}"
            fused = f"{block}.qkv" if kind[10] in "qkv" and "self" in kind else None
            layer = Layer(name, f"{name}.weight", "linear", shape, block, f"{block}.{kind.split('.')[0]}", fused=fused)
            spike = 9.0 if (block, kind) == (29, "mlp.down_proj") else 1.0
            found.append((layer, curve_of(shape, spike * loss / BLOCKS * depth * rng.lognormvariate(0, 0.45), rng)))
    return found


def allocate(curves: list[tuple[RatePoint, ...]], budget: int) -> list[RatePoint]:
    """Best points at the highest price per byte that fits: good enough for a picture."""
    low, high = 1e-12, 1e-2
    for _ in range(80):
        price = (low * high) ** 0.5
        points = [min(curve, key=lambda p: p.distortion + price * p.nbytes) for curve in curves]
        low, high = (price, high) if sum(p.nbytes for p in points) > budget else (low, price)
    return [min(curve, key=lambda p: p.distortion + high * p.nbytes) for curve in curves]


def tensor_fates(layers: list[Layer]) -> list[TensorFate]:
    fates = []
    for layer in layers:
        fates.append(TensorFate(layer.parameter, "BF16", layer.shape, "encoded", layer.parameter, ""))
    for block in range(BLOCKS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            name = f"model.layers.{block}.{norm}.weight"
            fates.append(TensorFate(name, "BF16", (HIDDEN,), "kept", name, "a vector"))
        name = f"model.layers.{block}.self_attn.rotary_emb.inv_freq"
        fates.append(TensorFate(name, "F32", (32,), "dropped", None, "computed by the model from its configuration"))
    fates.append(TensorFate("model.norm.weight", "BF16", (HIDDEN,), "kept", "model.norm.weight", "a vector"))
    tied = "shares its storage with model.embed_tokens.weight"
    fates.append(TensorFate("lm_head.weight", "BF16", (VOCABULARY, HIDDEN), "tied", "model.embed_tokens.weight", tied))
    return fates


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_report() -> ReportData:
    rng = random.Random(7)
    pairs = layers_and_curves(rng)
    kept_bytes = 61 * HIDDEN * 2
    tail = 61 * 110 + 8 + len(pairs)
    points = allocate([curve for _, curve in pairs], BUDGET - kept_bytes - tail)
    reports = tuple(
        LayerReport(
            layer, p.choice, p.nbytes - LAYER_HEADER, p.distortion,
            0.8 * 4.0 ** -CODECS[p.choice][0] * rng.uniform(0.6, 1.6), curve,
        )
        for (layer, curve), p in zip(pairs, points, strict=True)
    )  # fmt: skip
    file_bytes = sum(p.nbytes for p in points) + kept_bytes + tail
    predicted = sum(p.distortion for p in points)
    plan = Plan(
        {r.layer.name: PlanChoice(r.codec, p.nbytes, p.distortion) for r, p in zip(reports, points, strict=True)},
        BUDGET, file_bytes, predicted, {"solver": "feedback", "propagate": True, "seed": 0},
    )  # fmt: skip
    return ReportData(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        model_type="llama",
        parameters=134_515_008,
        source_bytes=269_060_552,
        budget=BUDGET,
        file_bytes=file_bytes,
        kept_bytes=kept_bytes,
        layers=reports,
        tensors=tuple(tensor_fates([layer for layer, _ in pairs])),
        quality=Quality(
            predicted * 1.118, 0.0031, 27.31, 22.54, 0.8127, 16_384, "encyclopaedic articles, held out"
        ),
        predicted=predicted,
        samples=(
            Sample("What causes the tides?", TEXT_BEFORE, TEXT_AFTER),
            Sample("Write a haiku about rain.",
                   "Soft rain on the roof,\nwhispers to the sleeping town,\nmorning wears it well.",
                   "Soft rain on the roof,\nwhispers to the quiet street,\nand the gardens drink."),
            Sample("Count from one to five.", "One, two, three, four, five.", "One, two, three, four, five."),
        ),
        stages=(
            Stage("Read the model", 2.9), Stage("Calibration text", 41.2), Stage("Statistics", 63.7),
            Stage("Rate–distortion curves", 97.4), Stage("Allocation", 0.84), Stage("Encode", 121.5),
            Stage("Verify and measure", 38.3), Stage("Report", 0.9),
        ),
        peak_memory=1_382_000_000,
        memory_cap=2_000_000_000,
        machine={"Processor": "Intel Xeon, AVX-512, AMX", "Threads": "2", "System": "Linux 6.1"},
        checks=(
            Check("The file fits the budget", True, f"{file_bytes:,} of {BUDGET:,} bytes"),
            Check("Every tensor reopened and decoded", True, "211 layers, largest deviation from the plan 0.0%"),
            Check("Calibration helped", True, "KL on held-out calibration text 0.121, without calibration 0.164"),
        ),
        notes=(
            Note("info", "The head is tied with the embedding and takes no bytes of its own."),
            Note("warning", "The Gram matrix was not positive definite at damping 0.01, which was raised to 0.04 for",
                 "model.layers.29.mlp.down_proj"),
            Note("warning", "Groups of 128 do not divide the width 576; codecs with that group were left out."),
        ),
        command="tersor compress SmolLM2-135M-Instruct --size 25% --out smollm2-25pc --text articles.txt --seed 0",
        versions={"tersor": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.4"},
        seeds={"sampling": 0, "rows": 1},
        texts=(
            TextRecord("calibration", "sampled from the model itself", 65_536, digest("calibration")),
            TextRecord("evaluation", "encyclopaedic articles, held out", 16_384, digest("evaluation")),
        ),
        fingerprint=digest("source"),
        files=tuple(
            FileDigest(name, size, digest(name))
            for name, size in [("model.safetensors", file_bytes), ("config.json", 9_412), ("tersor.json", 48_230)]
        ),
        plan=json.dumps(asdict(plan), indent=2),
        created="2026-11-22 01:48 UTC",
    )  # fmt: skip


@pytest.fixture(scope="session")
def full() -> ReportData:
    return make_report()


@pytest.fixture(scope="session")
def least() -> ReportData:
    """Only what is required."""
    return ReportData("tiny", "llama", 1000, 2000, None, 600, 100, (), ())
