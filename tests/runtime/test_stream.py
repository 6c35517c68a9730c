from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_models
from tersor.anatomy import WeightLoader, analyse, open_source, skeleton
from tersor.errors import CorruptArtifact, ShapeMismatch, UnknownArchitecture
from tersor.runtime.stream import BlockStream

IDS = torch.tensor([[5, 17, 3, 99, 0, 42, 8, 8, 61, 2], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])


class Watched:
    """A loader that notes what it was asked for."""

    def __init__(self, loader):
        self.loader = loader
        self.asked = []

    def __call__(self, names):
        self.asked.append(list(names))
        return self.loader.load(names)


def stream_of(folder, dtype=torch.float32):
    source = open_source(folder)
    model = skeleton(source)
    anatomy = analyse(source, model)
    load = Watched(WeightLoader(source, model))
    return BlockStream(model, anatomy, load, dtype=dtype), anatomy, load, model


def forward(stream, anatomy, ids):
    hidden = stream.embed(ids)
    for k in range(len(anatomy.blocks)):
        with stream.block(k) as module:
            hidden = stream.run(module, k, hidden)
    return stream.head(hidden)


def reference(folder, ids, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()
    with torch.no_grad():
        return model(ids, use_cache=False).logits.float()


@pytest.mark.parametrize("family", tiny_models.STREAMED)
def test_steps_compose_to_the_model(tiny, family):
    folder = tiny(family)
    stream, anatomy, _, _ = stream_of(folder)
    logits = forward(stream, anatomy, IDS)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, reference(folder, IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gptj", "deepseek", "gptoss"])
def test_half_precision_is_that_of_a_model_loaded_so(tiny, family):
    folder = tiny(family)
    stream, anatomy, _, _ = stream_of(folder, torch.bfloat16)
    assert stream.embed(IDS).dtype == torch.bfloat16
    logits = forward(stream, anatomy, IDS)
    torch.testing.assert_close(logits, reference(folder, IDS, torch.bfloat16), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama-tied", "falcon"])
def test_a_single_block(tiny, family):
    folder = tiny(family, num_hidden_layers=1)
    stream, anatomy, _, _ = stream_of(folder)
    torch.testing.assert_close(forward(stream, anatomy, IDS), reference(folder, IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "bloom", "mixtral"])
def test_batches_of_other_sizes(tiny, family):
    folder = tiny(family)
    stream, _, load, _ = stream_of(folder)
    expected = reference(folder, IDS)
    hidden = stream.embed(IDS)
    for k in range(2):
        with stream.block(k) as module:
            rows = [stream.run(module, k, row) for row in hidden.split(1)]
            hidden = torch.cat(rows)
    torch.testing.assert_close(stream.head(hidden[1:]), expected[1:], rtol=1e-5, atol=1e-5)
    shorter = stream.embed(IDS[:, :6])
    with stream.block(0) as module:
        assert stream.run(module, 0, shorter).shape == (2, 6, 32)
    assert load.asked


def test_only_what_a_step_needs_is_loaded_and_it_goes_again(tiny):
    stream, anatomy, load, _ = stream_of(tiny("llama"))
    hidden = stream.embed(IDS)
    assert {name for names in load.asked for name in names} == {"model.embed_tokens.weight", "model.norm.weight"}
    load.asked.clear()
    with stream.block(1) as module, stream.block(1) as again:
        assert again is module
        assert not any(parameter.is_meta for parameter in module.parameters())
    assert all(parameter.is_meta for parameter in module.parameters())
    expected = [n for n in (*(layer.parameter for layer in anatomy.layers), *anatomy.kept) if ".layers.1." in n]
    assert [sorted(names) for names in load.asked] == [sorted(expected)]
    load.asked.clear()
    with stream.head_module() as head:
        assert not head.get_submodule("lm_head").weight.is_meta
        stream.head(hidden)
        stream.head(hidden)
    assert head.get_submodule("lm_head").weight.is_meta
    assert load.asked == [["lm_head.weight", "model.norm.weight"]]


def test_opening_the_embedding_once_for_many_batches(tiny):
    stream, _, load, _ = stream_of(tiny("gpt2"))
    with stream.embed_module():
        first = [stream.embed(IDS) for _ in range(3)]
    assert len(load.asked) == 1
    assert torch.equal(first[0], first[2])


def test_streams_share_a_skeleton_and_leave_it_alone(tiny):
    folder = tiny("llama")
    one, anatomy, load, model = stream_of(folder)
    doubled = BlockStream(
        model, anatomy, lambda names: {n: 2 * t for n, t in load.loader.load(names).items()}, dtype=torch.bfloat16
    )
    hidden = one.embed(IDS)
    with one.block(0) as a, doubled.block(0) as b:
        ours, theirs = a.mlp.up_proj.weight, b.mlp.up_proj.weight
        assert torch.equal(2 * ours.bfloat16(), theirs)
        assert one.run(a, 0, hidden).dtype == torch.float32
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen3moe"])
def test_threads_give_what_one_thread_gives(tiny, family):
    stream, anatomy, _, _ = stream_of(tiny(family))
    batches = [IDS, IDS + 7, IDS[:, :5], IDS[:1], IDS.flip(1)] * 4
    batches = [batch % 100 for batch in batches]
    alone = [forward(stream, anatomy, batch) for batch in batches]
    stream.close()
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda batch: forward(stream, anatomy, batch), batches))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("family", ["llama-tied", "gemma2", "mixtral"])
def test_gradients_are_those_of_the_model(tiny, family):
    folder = tiny(family)
    stream, _, _, _ = stream_of(folder)
    start = stream.embed(IDS).requires_grad_()
    seen = []
    with stream.block(0) as first, stream.block(1) as second, stream.head_module():
        projection = second.get_submodule("self_attn.o_proj")
        handle = projection.register_full_backward_hook(lambda _m, _i, output: seen.append(output[0]))
        logits = stream.head(stream.run(second, 1, stream.run(first, 0, start)))
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        handle.remove()

    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    found = []
    name = next(n for n, _ in model.named_modules() if n.endswith("layers.1.self_attn.o_proj"))
    model.get_submodule(name).register_full_backward_hook(lambda _m, _i, output: found.append(output[0]))
    embedded = {}

    def keep(_module, args, kwargs):
        embedded["hidden"] = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        return (embedded["hidden"], *args[1:]), kwargs

    model.get_submodule(name.replace("1.self_attn.o_proj", "0")).register_forward_pre_hook(keep, with_kwargs=True)
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    torch.testing.assert_close(start.grad, embedded["hidden"].grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(seen[0], found[0], rtol=1e-4, atol=1e-7)


def test_masks_and_positions_can_be_used_under_autograd_after_inference_mode(tiny):
    stream, _, _, _ = stream_of(tiny("gemma2"))
    with torch.inference_mode():
        hidden = stream.embed(IDS)
    leaf = hidden.clone().requires_grad_()
    with stream.block(0) as module:
        stream.run(module, 0, leaf).sum().backward()
    assert leaf.grad is not None


def test_the_random_state_is_not_touched(tiny):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    stream, anatomy, _, _ = stream_of(tiny("mixtral"))
    forward(stream, anatomy, IDS)
    assert torch.equal(torch.get_rng_state(), before)


def test_blocks_that_need_the_text_are_refused(tiny):
    stream, _, _, _ = stream_of(tiny("gemma3n"))
    with pytest.raises(UnknownArchitecture, match="one by one"):
        stream.embed(IDS)


def test_a_model_that_changes_hidden_states_between_blocks_is_refused(tiny):
    _, anatomy, load, model = stream_of(tiny("llama"))
    inner = type(model.model)

    class Meddling(inner):
        def forward(self, input_ids=None, use_cache=None, **_):
            hidden = self.embed_tokens(input_ids)
            for layer in self.layers:
                hidden = layer(hidden) + 1
            return hidden

    model.model.__class__ = Meddling
    with pytest.raises(UnknownArchitecture, match="changed between"):
        BlockStream(model, anatomy, load, dtype=torch.float32).embed(IDS)


def test_what_the_loader_lacks_or_bends_is_named(tiny):
    _, anatomy, load, model = stream_of(tiny("llama"))
    name = "model.layers.2.mlp.down_proj.weight"

    def without(names):
        return {key: value for key, value in load.loader.load(names).items() if key != name}

    def bent(names):
        return {key: value.T if key == name else value for key, value in load.loader.load(names).items()}

    stream = BlockStream(model, anatomy, without, dtype=torch.float32)
    with pytest.raises(CorruptArtifact, match=r"layers\.2\.mlp\.down_proj\.weight"), stream.block(2):
        pass
    stream = BlockStream(model, anatomy, bent, dtype=torch.float32)
    with pytest.raises(ShapeMismatch, match=r"\(48, 32\), expected \(32, 48\)"), stream.block(2):
        pass
    assert all(parameter.is_meta for parameter in stream._blocks[2].parameters())
