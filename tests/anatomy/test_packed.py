"""Checkpoints packed as GPTQ, AWQ and compressed-tensors, read as ordinary models."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tersor
import tiny_packed
from tersor.anatomy import WeightLoader, analyse, open_source, skeleton
from tersor.anatomy.packed import unpack
from tersor.anatomy.packed.module import unpack_words
from tersor.anatomy.shards import list_tensors, map_tensor
from tersor.errors import BadInput, CorruptArtifact

Q = "model.layers.0.self_attn.q_proj"
GOLDEN = Path(__file__).parents[1] / "golden" / "packed.safetensors"


def check_values(made):
    """Every weight that the loader gives is bit for bit what the codes stand for, type included."""
    source = open_source(made.folder)
    loader = WeightLoader(source, skeleton(source))
    assert loader.unused == ()
    for name, expected in made.weights.items():
        found = loader.load([name])[name]
        assert found.dtype == expected.dtype, name
        assert torch.equal(found, expected), name
    return source


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 32, 45])
def test_codes_of_any_width_come_out_of_words(bits, count):
    codes = torch.randint(0, 1 << bits, (3, count), generator=torch.Generator().manual_seed(bits)).numpy()
    assert unpack_words(tiny_packed.pack(codes, bits), bits, count).tolist() == codes.tolist()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize(("group", "order", "index"), [(16, False, True), (16, True, True), (16, False, False)])
def test_gptq_of_all_widths_and_orders(gptq, bits, v2, group, order, index):
    source = check_values(gptq(bits, group, order=order, v2=v2, index=index))
    assert source.lossy_note == f"GPTQ {bits}-bit g16"


def test_gptq_with_one_scale_a_row_and_a_short_last_group(gptq, tmp_path):
    assert check_values(gptq(8, 48, group_size=-1)).lossy_note == "GPTQ 8-bit per row"
    shutil.rmtree(tmp_path / "packed")
    check_values(gptq(4, 20))


def test_a_zero_point_of_nought_that_borrowed_from_its_neighbour(gptq):
    """GPTQModel turns its zero points into those of the first format by subtracting from whole words."""
    made = gptq(4, v2=True)
    ones = torch.tensor(0x11111111, dtype=torch.int32)

    def no_zeros(tensors):
        tensors[f"{Q}.qzeros"] = torch.zeros_like(tensors[f"{Q}.qzeros"])

    made.change(no_zeros)
    source = open_source(made.folder)
    expected = WeightLoader(source, skeleton(source)).load([f"{Q}.weight"])[f"{Q}.weight"].clone()

    def to_first_format(tensors):
        for name in tensors:
            if name.endswith("qzeros"):
                tensors[name] = tensors[name] - ones

    made.change(to_first_format)
    made.configure(checkpoint_format="gptq")
    source = open_source(made.folder)
    assert torch.equal(WeightLoader(source, skeleton(source)).load([f"{Q}.weight"])[f"{Q}.weight"], expected)


@pytest.mark.parametrize(
    ("form", "v2", "index"),
    [("auto_round:auto_gptq", False, False), ("auto_round", True, False), ("auto_round:gptqmodel", True, True)],
)
def test_autoround_in_the_layouts_of_gptq(gptq, form, v2, index):
    made = gptq(4, v2=v2, index=index)
    made.configure(quant_method="auto-round", packing_format=form, checkpoint_format=..., data_type="int")
    assert check_values(made).lossy_note == "AutoRound 4-bit g16"


def test_autoround_in_the_layout_of_awq(awq):
    made = awq(quant_method="auto-round", packing_format="auto_round:auto_awq")
    assert check_values(made).lossy_note == "AutoRound 4-bit g16"


def test_gptq_with_exceptions_for_some_modules(gptq):
    made = gptq(4, 16, dynamic={"+:.*q_proj.*": {"bits": 8, "group_size": 32}})
    weight = load_file(made.folder / "model.safetensors")["model.embed_tokens.weight"][:32]
    rounded = tiny_packed.round_off(weight, 8, 32, order=False, dtype=torch.float16)
    made.weights[f"{Q}.weight"] = rounded.values()
    made.change(lambda t: t.update({f"{Q}.{leaf}": v.contiguous() for leaf, v in tiny_packed.gptq(rounded, 8).items()}))
    assert check_values(made).lossy_note == "GPTQ 4-bit g16, 8-bit per row"


def test_scales_of_32_bits_give_weights_of_the_models_type(gptq):
    made = gptq(dtype=torch.float32)
    source = open_source(made.folder)
    found = WeightLoader(source, skeleton(source)).load([f"{Q}.weight"])[f"{Q}.weight"]
    assert found.dtype == torch.float16
    assert torch.equal(found, made.weights[f"{Q}.weight"].half())


def test_experts_one_by_one(gptq):
    made = gptq(family="qwen3moe")
    source = open_source(made.folder)
    model = skeleton(source)
    loader = WeightLoader(source, model)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    stack = loader.load([name])[name]
    for expert in range(4):
        halves = [made.weights[f"model.layers.1.mlp.experts.{expert}.{kind}_proj.weight"] for kind in ("gate", "up")]
        assert torch.equal(stack[expert], torch.cat(halves))
    assert not [fate for fate in analyse(source, model).tensors if fate.fate == "dropped"]


@pytest.mark.parametrize("group", [16, 32])
def test_awq(awq, group):
    shown = "g16" if group == 16 else "per row, 4-bit g32"  # most layers have 32 inputs, some 48
    assert check_values(awq(group, version="gemm")).lossy_note == f"AWQ 4-bit {shown}"


def test_awq_for_gemv_and_without_a_version(awq, tmp_path):
    check_values(awq(16, width=2, version="GEMV"))
    shutil.rmtree(tmp_path / "packed")
    check_values(awq(16))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(("order", "index"), [(False, False), (True, True)])
def test_compressed_tensors_that_are_packed(compressed, bits, order, index):
    assert check_values(compressed(bits, order=order, index=index)).lossy_note == f"compressed-tensors {bits}-bit g16"


def test_an_index_that_says_nothing(compressed):
    made = compressed()
    made.change(lambda t: t.update({f"{Q}.weight_g_idx": torch.full((32,), -1, dtype=torch.int32)}))
    check_values(made)


def test_what_other_programs_wrote():
    """``tests/golden/make_packed.py`` had GPTQModel and compressed-tensors pack tensors and compute their weights."""
    with safe_open(GOLDEN, "pt") as file:
        meta = json.loads(file.metadata()["cases"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    assert {case["settings"]["quant_method"] for case in meta.values()} == {"gptq", "awq", "compressed-tensors"}
    for name, case in meta.items():
        found = unpacked(
            case["settings"], {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
        )
        assert [str(found.dtype), list(found.shape)] == [case["dtype"], case["shape"]], name
        assert hashlib.sha256(found.view(torch.uint8).numpy().tobytes()).hexdigest() == case["sha256"], name


def unpacked(settings, tensors):
    """The weight of one module's tensors."""
    with tempfile.TemporaryDirectory() as folder:
        save_file({f"m.{name}": t for name, t in tensors.items()}, Path(folder) / "model.safetensors")
        made, _ = unpack({"quantization_config": settings}, list_tensors(Path(folder)), Path(folder))
        return map_tensor(made["m.weight"])


def drop(name):
    return lambda tensors: tensors.pop(f"{Q}.{name}")


def put(name, make):
    return lambda tensors: tensors.update({f"{Q}.{name}": make(tensors.get(f"{Q}.{name}"))})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (drop("qzeros"), r"q_proj has no tensor .*q_proj\.qzeros"),
        (drop("scales"), r"has no tensor .*q_proj\.scales"),
        (put("qzeros", lambda t: t[:1].clone()), r"qzeros .* the shape \(1, 4\), expected \(2, 4\)"),
        (put("qzeros", lambda t: t[:, :1].clone()), r"qzeros .* shape \(2, 1\)"),
        (put("scales", lambda t: t[:, :5].clone()), r"scales .* shape \(2, 5\), expected \(2, 32\)"),
        (put("scales", lambda t: t[0].clone()), "expected two axes"),
        (put("scales", lambda t: t.to(torch.int32)), "has the type int32, expected float16 or bfloat16 or float32"),
        (put("qweight", lambda t: t[:-1].clone()), r"qweight .* shape \(3, 32\), expected \(4, 32\)"),
        (put("qweight", lambda t: t.long()), "has the type int64, expected int32"),
        (put("g_idx", lambda t: t + 1), r"groups 1 to 2, but there are only 2 groups \(0 to 1\)"),
        (put("g_idx", lambda t: t - 1), "groups -1 to 0"),
        (put("g_idx", lambda t: t[:, None].clone()), r"g_idx .* shape \(32, 1\)"),
        (put("weight", lambda _: torch.zeros(32, 32)), r"holds .*q_proj\.weight as it is, and packed too"),
    ],
)
def test_malformed_gptq_gets_its_sentence(gptq, tmp_path, edit, words):
    made = gptq()
    made.change(edit)
    with pytest.raises(CorruptArtifact, match=words) as caught:
        tersor.compress(made.folder, tmp_path / "out", size="50%")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_groups_that_do_not_cover_the_inputs(gptq):
    made = gptq(index=False)
    made.configure(group_size=8)
    with pytest.raises(CorruptArtifact, match=r"has 3 groups, expected 6"):
        open_source(made.folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 5}, "5 bits; read are 2, 3, 4, 8"),
        ({"bits": None}, "None bits"),
        ({"group_size": 0}, "group_size 0"),
        ({"checkpoint_format": "marlin"}, "format 'marlin'"),
        ({"is_marlin_format": True}, "format 'marlin'"),
        ({"format": "gptq_p"}, "format 'gptq_p'"),
        ({"pack_dtype": "int16"}, "packed into int16"),
        ({"quant_method": "bitsandbytes"}, r"bitsandbytes.*dequantize\(\)\.save_pretrained"),
        ({"quant_method": "hqq"}, "quantized with hqq, which is not read"),
        ({"quant_method": ...}, "unnamed method"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:fp8_static"}, "'auto_round:fp8_static'"),
        ({"quant_method": "auto-round", "data_type": "mx_fp"}, "numbers 'mx_fp'"),
        ({"quant_method": "auto-round", "spinquant_config": {"r1": True}}, r"rotates .* \(spinquant_config\)"),
        ({"quant_method": "awq", "version": "gemv_fast"}, "version 'gemv_fast'"),
        ({"quant_method": "awq", "bits": 8}, "8 bits; only 4"),
        ({"quant_method": "awq", "group_size": "many"}, "group_size 'many'"),
    ],
)
def test_settings_that_are_not_read_get_their_sentence(gptq, tmp_path, settings, words):
    made = gptq()
    made.configure(**settings)
    with pytest.raises(BadInput, match=words) as caught:
        tersor.plan(made.folder, size="50%", fast=True)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_another_number_of_bits_than_the_configuration_says(gptq):
    made = gptq(4)
    made.configure(bits=8)
    with pytest.raises(CorruptArtifact, match=r"qzeros .* shape \(3, 4\), expected \(3, 8\)"):
        open_source(made.folder)


def test_a_configuration_that_is_no_object_or_packs_nothing(gptq, complete):
    made = gptq()
    file = made.folder / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps({**raw, "quantization_config": "gptq"}))
    with pytest.raises(CorruptArtifact, match="not a JSON object"):
        open_source(made.folder)
    file.write_text(json.dumps(raw))
    shutil.copyfile(complete("llama") / "model.safetensors", made.folder / "model.safetensors")
    with pytest.raises(CorruptArtifact, match="holds no tensor packed that way"):
        open_source(made.folder)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (drop("qzeros"), "has no tensor"),
        (put("qzeros", lambda t: t[:1].clone()), r"qzeros .* expected \(2, 4\)"),
        (put("scales", lambda t: t[:1].clone()), r"scales .* expected \(2, 32\)"),
        (put("qweight", lambda t: t[0].clone()), "expected two axes"),
        (put("qweight", lambda t: t[:0].clone()), r"qweight .* is empty: its shape is \(0, 4\)"),
    ],
)
def test_malformed_awq_gets_its_sentence(awq, edit, words):
    made = awq()
    made.change(edit)
    with pytest.raises(CorruptArtifact, match=words):
        open_source(made.folder)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (drop("weight_scale"), "has no tensor"),
        (drop("weight_shape"), "has no tensor"),
        (put("weight_packed", lambda t: t[:, :-1].clone()), "no number of bits among 4"),
        (put("weight_packed", lambda t: t[:-1].clone()), "no number of bits"),
        (put("weight_scale", lambda t: t[:5].clone()), "expected 32 rows"),
        (put("weight_scale", lambda _: torch.ones(32, 3)), r"weight_zero_point .* expected \(4, 3\)"),
        (put("weight_zero_point", lambda t: t[:1].clone()), "weight_zero_point"),
        (put("weight_g_idx", lambda _: torch.full((32,), 2, dtype=torch.int32)), "only 2 groups"),
    ],
)
def test_malformed_compressed_tensors_get_their_sentence(compressed, edit, words):
    made = compressed()
    made.change(edit)
    with pytest.raises(CorruptArtifact, match=words):
        open_source(made.folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized', which is not read"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "stored sparse"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "rotates activations"),
    ],
)
def test_compressed_tensors_that_are_not_read(compressed, settings, words):
    with pytest.raises(BadInput, match=words):
        open_source(compressed(**settings).folder)


@pytest.mark.parametrize("key", ["config_groups", "sparsity_config", "transform_config"])
def test_settings_of_compressed_tensors_that_are_no_objects(compressed, key):
    with pytest.raises(CorruptArtifact, match=rf"{key} .* is \['x'\], not a JSON object"):
        open_source(compressed(**{key: ["x"]}).folder)


def test_few_inputs_have_the_bits_that_the_configuration_says():
    """Eight codes fill one word at 1, 2, 3 and 4 bits."""
    settings = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4}}}}
    codes = torch.arange(8, dtype=torch.int64).numpy()[None]
    found = unpacked(
        settings,
        {
            "weight_packed": tiny_packed.pack(codes, 4),
            "weight_scale": torch.ones(1, 1),
            "weight_shape": torch.tensor([1, 8]),
        },
    )
    assert found.tolist() == [[-8, -7, -6, -5, -4, -3, -2, -1]]


def test_int8_and_float8_with_scales_of_all_kinds(complete, tmp_path):
    tensors = load_file(complete("llama", dtype=torch.bfloat16) / "model.safetensors")
    weight = tensors[f"{Q}.weight"]

    def check(settings, dtype, scales, tile, leaf="weight_scale"):
        scale = torch.rand(scales, generator=torch.Generator().manual_seed(1)) + 0.5
        codes = (weight * 50).round().clamp(-127, 127).to(dtype)
        found = unpacked(settings, {"weight": codes, leaf: scale.to(torch.bfloat16)})
        grid = scale.to(torch.bfloat16).float().reshape(-(-32 // tile[0]), -(-32 // tile[1]))
        spread = grid.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)[:32, :32]
        assert torch.equal(found, (codes.float() * spread).to(torch.bfloat16))

    ints = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    floats = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    blocks = {**floats, "config_groups": {"g": {"weights": {"block_structure": [12, 20]}}}}
    for shape, tile in (((), (32, 32)), ((1,), (32, 32)), ((32, 1), (1, 32)), ((32,), (1, 32)), ((32, 4), (1, 8))):
        check(ints, torch.int8, shape, tile)
        check(floats, torch.float8_e4m3fn, shape, tile)
    check(blocks, torch.float8_e4m3fn, (3, 2), (12, 20))
    fp8 = {"quant_method": "fp8", "weight_block_size": [12, 20]}
    check(fp8, torch.float8_e4m3fn, (3, 2), (12, 20), "weight_scale_inv")
    with pytest.raises(CorruptArtifact, match="one scale neither for all"):
        check(floats, torch.float8_e4m3fn, (3, 2), (12, 20))
    with pytest.raises(BadInput, match="not two numbers"):
        check(
            {"quant_method": "fp8", "weight_block_size": 128}, torch.float8_e4m3fn, (3, 2), (12, 20), "weight_scale_inv"
        )
