"""Products with codes row by row, against their torch specification, at every level of instructions."""

import multiprocessing
from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.codecs.packing import pack
from tersor.kernels import products, reference_products

pytestmark = pytest.mark.skipif(not products.available, reason="nothing was compiled")
LEVELS = ("avx512", "avx2", "portable")


@pytest.fixture(autouse=True)
def _all_levels_again() -> Iterator[None]:
    yield
    products._products.limit_isa("avx512")


def _weight(seed: int, rows: int, columns: int, bits: int, group: int | None, kind: str, style: str) -> dict:
    draw = torch.Generator().manual_seed(seed)
    groups = columns // (group or columns)
    described = {
        "codes": pack(torch.randint(2**bits, (rows, columns), generator=draw, dtype=torch.int32), bits),
        "bits": bits,
        "columns": columns,
        "group": group,
    }
    scale = torch.rand(rows, groups, generator=draw) + 0.1
    if kind == "s8":
        described["scale"] = (scale * 200).to(torch.uint8)
        described["super_scale"] = torch.rand(rows, 1, generator=draw).half()
    else:
        described["scale"] = scale.to({"fp16": torch.float16, "bf16": torch.bfloat16}[kind])
    if style == "zero":
        described["zero"] = pack(torch.randint(2**bits, (rows, groups), generator=draw, dtype=torch.int32), bits)
    elif style == "middle":
        described["middle"] = (2**bits - 1) / 2
    else:
        described["table"] = torch.randn(rows if style == "tables" else 1, 2**bits, generator=draw)
    return described


def _inputs(seed: int, tokens: int, columns: int) -> Tensor:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    x[0, 0] = 25.0  # an outlier: all other inputs of the token have coarser steps
    return x


def _close(
    found: Tensor, wanted: Tensor, weight: Tensor, x: Tensor, share: float, described: dict | None = None
) -> bool:
    """Errors within a share of what the largest input times the weight's row could give.

    Codes and zeros are multiplied apart: even where they cancel, as in a row of zeros, there are errors of its steps.
    """
    size = weight.norm(dim=1)
    if described is not None:
        step = described["scale"].float() * described.get("super_scale", torch.ones(1)).float()
        size = size.maximum(step.amax(1))
    bound = x.abs().amax(1, keepdim=True) * size[None] * weight.shape[1] ** 0.5
    return bool(((found - wanted).abs() <= share * bound + 1e-30).all())


@settings(deadline=None, max_examples=60)
@example(
    seed=180188, rows=9, bits=1, shape=(7, None), kind="s8", style="zero", tokens=1, precision=16
)  # a row of zeros
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 40),
    bits=st.integers(1, 8),
    shape=st.sampled_from(
        [(64, None), (7, None), (577, None), (96, 32), (120, 24), (128, 64), (256, 128), (320, 160), (12, 4)]
    ),
    kind=st.sampled_from(["fp16", "bf16", "s8"]),
    style=st.sampled_from(["middle", "zero", "table", "tables"]),
    tokens=st.integers(1, 9),
    precision=st.sampled_from([8, 16]),
)
def test_products_are_those_of_the_specification(seed, rows, bits, shape, kind, style, tokens, precision):
    described = _weight(seed, rows, shape[0], bits, shape[1], kind, style)
    weight = reference_products.row_codes(**described)
    x = _inputs(seed, tokens, shape[0])
    wanted = reference_products.product(weight, x, precision)
    product = products.row_codes(**described)
    # Tables are rounded to 16 bits from end to end.
    share = 1e-4 if style in ("table", "tables") else 1e-6
    for level in LEVELS:
        products._products.limit_isa(level)
        found = products.multiply(product, x, bits=precision)
        assert _close(found, wanted, weight, x, share, described), level


def test_sixteen_bits_lose_little_and_eight_more():
    described = _weight(3, 64, 1024, 4, 64, "fp16", "middle")
    weight, x = reference_products.row_codes(**described), _inputs(4, 5, 1024)
    exact = x.double() @ weight.double().T
    product = products.row_codes(**described)
    loss = {bits: float((products.multiply(product, x, bits=bits) - exact).norm() / exact.norm()) for bits in (8, 16)}
    assert loss[16] < 5e-4
    assert loss[16] < loss[8] / 50
    assert loss[8] < 0.1


@pytest.mark.parametrize("level", LEVELS)
def test_threads_and_other_tokens_change_nothing(level):
    products._products.limit_isa(level)
    product = products.row_codes(**_weight(5, 301, 320, 3, 32, "fp16", "zero"))
    x = _inputs(6, 11, 320)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(products.multiply(product, x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    alone = torch.cat([products.multiply(product, token[None]) for token in x])
    assert torch.equal(alone, found[0])


@pytest.mark.parametrize("style", ["middle", "zero", "table", "tables"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_token_alone_gives_what_it_gives_among_others(bits, style):
    # Loops take other numbers of rows at a time then; the sum of a row must not depend on that.
    for level in LEVELS:
        products._products.limit_isa(level)
        for columns, group in ((320, 32), (200, None), (512, 256)):
            product = products.row_codes(**_weight(5, 45, columns, bits, group, "fp16", style))
            x = _inputs(6, 5, columns)
            for rounded in (8, 16):
                alone = [products.multiply(product, token[None], bits=rounded) for token in x]
                assert torch.equal(torch.cat(alone), products.multiply(product, x, bits=rounded)), (level, columns)


@pytest.mark.parametrize("level", LEVELS)
def test_inputs_of_zeros_and_of_no_numbers(level):
    products._products.limit_isa(level)
    product = products.row_codes(**_weight(7, 9, 64, 4, 32, "fp16", "middle"))
    x = _inputs(8, 4, 64)
    x[1] = 0
    x[2, 5] = float("nan")
    x[3, 5] = float("inf")
    found = products.multiply(product, x)
    assert bool((found[1] == 0).all())
    assert bool(found[2:].isnan().all())
    assert bool(found[0].isfinite().all())


@pytest.mark.parametrize("group", [4, 8, 16, 20, 32, 48])
@pytest.mark.parametrize("bits", range(1, 9))
def test_groups_as_wide_as_what_loops_fetch_scales_for(bits, group):
    for groups in (3, 24, 37):
        described = _weight(bits, 9, group * groups, bits, group, "fp16", "middle")
        weight, x = reference_products.row_codes(**described), _inputs(groups, 6, group * groups)
        for level in LEVELS:
            products._products.limit_isa(level)
            found = products.multiply(products.row_codes(**described), x)
            assert _close(found, reference_products.product(weight, x), weight, x, 1e-6), (level, groups)


def test_the_smallest_and_largest_stored_scales():
    described = _weight(9, 3, 64, 4, 32, "fp16", "middle")
    described["scale"] = torch.tensor([[2.0**-24, 65504.0], [2.0**-15, 1.0], [6e-8, 2.0**-14]]).half()
    weight, x = reference_products.row_codes(**described), _inputs(10, 2, 64)
    found = products.multiply(products.row_codes(**described), x)
    assert _close(found, reference_products.product(weight, x), weight, x, 1e-6)


def _in_child(product_of: dict, x: Tensor, answers: multiprocessing.Queue) -> None:
    answers.put(products.multiply(products.row_codes(**product_of), x).tolist())


def test_a_forked_process_has_threads_of_its_own():
    described = _weight(11, 200, 256, 4, 64, "fp16", "middle")
    x = _inputs(12, 2, 256)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        here = products.multiply(products.row_codes(**described), x)
        context = multiprocessing.get_context("fork")
        answers = context.Queue()
        child = context.Process(target=_in_child, args=(described, x, answers))
        child.start()
        there = answers.get(timeout=60)
        child.join()
    finally:
        torch.set_num_threads(before)
    assert there == here.tolist()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bits": 9}, "1 to 8 bits"),
        ({"columns": 96}, "96 codes of 4 bits take 48"),
        ({"group": 48}, "does not divide 64"),
        ({"scale": torch.ones(9, 3, dtype=torch.float16)}, r"must be \(9, 2\)"),
        ({"super_scale": torch.ones(9, 1, dtype=torch.float16)}, "numbers of 8 bits"),
        ({"zero": torch.zeros(9, 3, dtype=torch.uint8)}, r"zeros must be \(9, 1\)"),
        ({"table": torch.zeros(2, 16)}, "2 tables for 9 rows"),
        ({"table": torch.zeros(1, 8)}, "need 16"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        products.row_codes(**{**_weight(13, 9, 64, 4, 32, "fp16", "middle"), **change})


def test_inputs_of_another_width_are_refused():
    product = products.row_codes(**_weight(14, 9, 64, 4, 32, "fp16", "middle"))
    with pytest.raises(ValueError, match="inputs have 63 columns, the weight 64"):
        products.multiply(product, torch.zeros(1, 63))


def test_stored_tensors_are_used_where_they_lie():
    described = _weight(15, 8, 64, 8, None, "fp16", "middle")
    product = products.row_codes(**described)
    x = _inputs(16, 1, 64)
    before = products.multiply(product, x)
    described["codes"][0] = 255
    after = products.multiply(product, x)
    assert not torch.equal(before[:, 0], after[:, 0])
    assert torch.equal(before[:, 1:], after[:, 1:])


def test_a_weight_without_rows_gives_nothing():
    described = _weight(17, 1, 64, 4, 32, "fp16", "middle")
    for name in ("codes", "scale"):
        described[name] = described[name][:0]
    assert products.multiply(products.row_codes(**described), _inputs(18, 2, 64)).shape == (2, 0)


def test_many_products_of_other_numbers_of_parts_one_after_the_other():
    """Threads that are late for one job meet the next, which has more parts or fewer."""
    before = torch.get_num_threads()
    several = [
        products.row_codes(**_weight(19 + i, rows, 128, 4, 32, "fp16", "middle"))
        for i, rows in enumerate((900, 70, 2000))
    ]
    x = _inputs(20, 1, 128)
    wanted = [products.multiply(product, x) for product in several]
    torch.set_num_threads(4)
    try:
        for _ in range(700):
            for product, one in zip(several, wanted, strict=True):
                assert torch.equal(products.multiply(product, x), one)
    finally:
        torch.set_num_threads(before)
