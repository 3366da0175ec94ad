"""From projections to attention's input: which calls the kernels take, the definitions, and the kernels on a GPU."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import StaticCache

from configuration_minimax_m3 import tiny_config
from modeling_minimax_m3.fused import few_tokens
from modeling_minimax_m3.fused.attention_input import (
    CacheSlots,
    attention_input,
    attention_input_reference,
    rotary_table,
    rotary_table_reference,
    takes_attention_input,
    takes_rotary_table,
)
from modeling_minimax_m3.layers.rotary import MiniMaxM3VLRotaryEmbedding
from modeling_minimax_m3.models.text import MiniMaxM3VLForCausalLM
from modeling_minimax_m3.runtime.cache import MiniMaxM3VLSparseStaticLayer, MiniMaxM3VLStaticLayer

from .few_token_cases import EPS, captured, on_gpu, pretend_kernels, random, set_kernels_take
from .norm_cases import exact_norm_rotary, poison, relative_error

HALVES = [torch.bfloat16, torch.float16]
TEXT = {"head_dim": 64, "index_head_dim": 64, "hidden_size": 128, "intermediate_size": 64}


class Case:
    """Projections, norms, rotary tables and a cache that holds some tokens, all of it random."""

    def __init__(
        self,
        batch=2,
        num_new=1,
        heads=4,
        kv_heads=2,
        head_dim=64,
        channels=32,
        has_index=True,
        *,
        length=5,
        num_slots=12,
        dtype=torch.bfloat16,
        rotary_dtype=None,
        rotary_rows=None,
        strided=False,
        device="cpu",
        seed=0,
    ):
        options = {"dtype": dtype, "device": device}
        rotary_options = {"dtype": rotary_dtype or dtype, "device": device}
        self.num_heads, self.kv_heads, self.head_dim, self.eps = heads, kv_heads, head_dim, EPS
        all_heads = heads + 2 * kv_heads + (kv_heads + 1 if has_index else 0)
        self.projected = random(batch, num_new, all_heads * head_dim, seed=seed + 1, scale=3.0, **options)
        self.norms = [random(head_dim, seed=seed + 2 + i, scale=0.5, **options) for i in range(4 if has_index else 2)]
        rows = rotary_rows or batch
        angles = random(rows, num_new, channels // 2, seed=seed + 7, scale=9.0, dtype=torch.float32, device=device)
        angles = torch.cat((angles, angles), dim=-1)
        self.rotary = angles.cos().to(rotary_options["dtype"]), angles.sin().to(rotary_options["dtype"])

        def memory(heads, number):
            if strided:  # head-major, inside of a larger buffer
                whole = random(batch + 1, heads, num_slots + 3, head_dim + 8, seed=seed + number, **options)
                return whole[1:, :, 2 : 2 + num_slots, :head_dim].transpose(1, 2)
            return random(batch, num_slots, heads, head_dim, seed=seed + number, **options)

        self.slots = CacheSlots(
            torch.tensor(length, device=device),
            memory(kv_heads, 10),
            memory(kv_heads, 11),
            memory(1, 12) if has_index else None,
        )

    @property
    def caches(self):
        return [states for states in self.slots[1:] if states is not None]

    def copy_of_slots(self):
        """In memory of its own, with the same strides of a row's elements left behind."""
        return CacheSlots(*(None if states is None else states.clone() for states in self.slots))

    def takes(self):
        return takes_attention_input(self.projected, self.norms, self.rotary, self.slots)

    def call(self, function, slots=None):
        return function(self.projected, self.norms, self.rotary, self.eps, slots or self.slots)

    def exact(self):
        """Query, index query, and what the new slots of each cache hold, in float64."""
        heads = self.projected.double().unflatten(-1, (-1, self.head_dim))
        index = [self.kv_heads, 1] if self.slots.index_keys is not None else []
        query, key, value, *index = heads.split([self.num_heads, self.kv_heads, self.kv_heads, *index], dim=2)
        rotary = [table.double() for table in self.rotary]
        states = [query, key, *index]
        turned = [exact_norm_rotary(x, norm.double(), *rotary, self.eps) for x, norm in zip(states, self.norms)]
        index_query, *index_key = turned[2:] or [query[:, :, :0]]
        return turned[0], index_query, [turned[1], value, *index_key]


def check_slots(before, after, new, length, tolerance):
    """The new slots hold `new`, all others are as before."""
    num_new, num_slots = new[0].shape[1], before[0].shape[1]
    is_new = torch.zeros(num_slots, dtype=torch.bool, device=before[0].device)
    is_new[length : length + num_new] = True
    room = int(is_new.sum())
    for number, (old, states, expected) in enumerate(zip(before, after, new, strict=True)):
        assert torch.equal(states[:, ~is_new], old[:, ~is_new])
        if room:
            found, exact = states[:, is_new], expected[:, :room]
            if number == 1:
                assert torch.equal(found.double(), exact), "values are copied"
            else:
                assert relative_error(found, exact) <= tolerance[number]


class TestDefinition:
    @pytest.mark.parametrize("has_index", [True, False])
    @pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)], ids=str)
    def test_formula(self, dtype, limit, has_index):
        for num_new, rows in ((1, None), (3, 1), (4, 2)):
            case = Case(num_new=num_new, has_index=has_index, dtype=dtype, rotary_rows=rows)
            before = [states.clone() for states in case.caches]
            query, index_query = case.call(attention_input_reference)
            exact_query, exact_index, new = case.exact()
            assert query.shape == (2, num_new, 4, 64) and relative_error(query, exact_query) < limit
            assert index_query.shape == (2, num_new, 2 if has_index else 0, 64)
            assert not has_index or relative_error(index_query, exact_index) < limit
            check_slots(before, case.caches, new, 5, [limit] * 3)

    @pytest.mark.parametrize("length", [10, 12, 40, -2])
    def test_full_cache(self, length):
        case = Case(num_new=3, length=length)
        with pytest.raises((IndexError, RuntimeError), match="index"):
            case.call(attention_input_reference)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    def test_rotary_table_is_that_of_the_embedding(self, dtype):
        embedding = MiniMaxM3VLRotaryEmbedding(tiny_config().text_config)
        positions = torch.tensor([[0, 1, 131071], [7, 2**24, 3]])
        x = torch.zeros(1, dtype=dtype)
        tables = rotary_table_reference(x, positions, embedding.inv_freq, 1.0)
        for table, expected, function in zip(tables, embedding(x, positions), (torch.cos, torch.sin)):
            assert table.dtype == dtype and torch.equal(table, expected)
            angles = (positions.double()[..., None] * embedding.inv_freq).float()
            exact = function(torch.cat((angles, angles), dim=-1).double())
            torch.testing.assert_close(table.double(), exact, rtol=0, atol=1e-6 if dtype != torch.bfloat16 else 4e-3)
        scaled = rotary_table_reference(x, positions, embedding.inv_freq, 1.25)
        assert relative_error(scaled[0], 1.25 * tables[0].double()) < 3e-3


def change_slots(case, **changes):
    case.slots = case.slots._replace(**changes)


def change_rotary(case, *changes):
    case.rotary = tuple(change(table) for change, table in zip(changes, case.rotary))


def misaligned(tensor):
    flat = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
    return flat.copy_(tensor)


class TestWhatTheKernelsTake:
    """On tensors of a CPU, which the kernels would take if they were a GPU's."""

    @pytest.fixture(autouse=True)
    def calls(self, monkeypatch):
        return pretend_kernels(monkeypatch)

    TAKEN = {
        "a token": {},
        "no index": {"has_index": False},
        "several tokens, one row of positions": {"batch": 4, "num_new": 4, "rotary_rows": 1},
        "128 channels of a head": {"head_dim": 128, "channels": 128},
        "16 rotary channels": {"channels": 16},
        "cosines in float32": {"rotary_dtype": torch.float32},
        "float16": {"dtype": torch.float16},
        "strided caches": {"strided": True},
    }

    @pytest.mark.parametrize("name", TAKEN)
    def test_taken(self, calls, name):
        case = Case(**self.TAKEN[name])
        assert case.takes()
        other = case.copy_of_slots()
        found = case.call(attention_input)
        for states, expected in zip(found, case.call(attention_input_reference, other)):
            assert torch.equal(states, expected)
        for states, expected in zip(case.slots[1:], other[1:]):
            assert states is None or torch.equal(states, expected)
        assert calls == ["attention_input"]

    REFUSED = {
        "float32": (lambda case: None, {"dtype": torch.float32}),
        "32 channels of a head": (lambda case: None, {"head_dim": 32, "channels": 16}),
        "24 rotary channels": (lambda case: None, {"channels": 24}),
        "norms in float32": (lambda case: setattr(case, "norms", [norm.float() for norm in case.norms]), {}),
        "index norms of another size": (lambda case: case.norms.__setitem__(2, case.norms[2][:32]), {}),
        "misaligned norm": (lambda case: case.norms.__setitem__(1, misaligned(case.norms[1])), {}),
        "strided norm": (lambda case: case.norms.__setitem__(1, random(128)[::2]), {}),
        "gradient of a norm": (lambda case: case.norms[3].requires_grad_(), {}),
        "gradient of the states": (lambda case: case.projected.requires_grad_(), {}),
        "cosines of another dtype": (lambda case: change_rotary(case, torch.Tensor.half, torch.Tensor.half), {}),
        "sines of another dtype": (lambda case: change_rotary(case, torch.Tensor.float, torch.clone), {}),
        "sines of another shape": (lambda case: change_rotary(case, torch.clone, lambda sin: sin[..., :16]), {}),
        "more cosines than channels": (lambda case: change_rotary(case, *[lambda x: torch.cat([x] * 3, -1)] * 2), {}),
        "cosines of other tokens": (lambda case: change_rotary(case, *[lambda x: x[:, :1]] * 2), {"num_new": 3}),
        "cosines of other rows": (lambda case: change_rotary(case, *[lambda x: x[:2]] * 2), {"batch": 3}),
        "keys of another dtype": (lambda case: change_slots(case, keys=case.slots.keys.half()), {}),
        "values of another size": (lambda case: change_slots(case, values=case.slots.values[..., :32]), {}),
        "strided channels": (lambda case: change_slots(case, keys=case.slots.keys.mT.contiguous().mT), {}),
        "misaligned values": (lambda case: change_slots(case, values=misaligned(case.slots.values)), {}),
        "odd strides": (lambda case: change_slots(case, keys=random(2, 12, 2, 68)[..., :64]), {}),
        "fewer rows in the cache": (
            lambda case: change_slots(
                case, **{name: getattr(case.slots, name)[:1] for name in case.slots._fields[1:]}
            ),
            {},
        ),
        "fewer slots of values": (lambda case: change_slots(case, values=case.slots.values[:, :-1]), {}),
        "fewer slots of index keys": (lambda case: change_slots(case, index_keys=case.slots.index_keys[:, :-1]), {}),
    }

    @pytest.mark.parametrize("reason", REFUSED)
    def test_refused(self, reason):
        change, options = self.REFUSED[reason]
        case = Case(**options)
        change(case)
        assert not case.takes()

    def test_gradients_that_are_off(self):
        case = Case()
        case.norms[3].requires_grad_()
        with torch.no_grad():
            assert case.takes()

    def test_rotary_tables_that_are_no_rows(self, calls):
        """They are copied."""
        case = Case()
        other = case.copy_of_slots()
        expected = case.call(attention_input_reference, other)
        change_rotary(case, misaligned, lambda sin: sin.repeat_interleave(2, dim=-1)[..., ::2])
        assert case.takes() and torch.equal(case.call(attention_input)[0], expected[0])

    def test_rotary_table(self, calls):
        x, frequencies = random(1), torch.rand(16)
        positions = torch.arange(10).view(2, 5)
        assert takes_rotary_table(x, positions, frequencies)
        found = rotary_table(x, positions, frequencies, 1.0)
        assert calls == ["rotary_table"]
        for table, expected in zip(found, rotary_table_reference(x, positions, frequencies, 1.0)):
            assert torch.equal(table, expected)
        for refused in (
            (x.float(), positions, frequencies),
            (x, positions.int(), frequencies),
            (x, positions[None], frequencies),
            (x, positions, frequencies.double()),
        ):
            assert not takes_rotary_table(*refused)
            rotary_table(*refused, 1.0)
        assert len(calls) == 1


def test_a_cpu_runs_the_definitions():
    case = Case()
    assert not case.takes()
    assert not takes_rotary_table(random(1), torch.zeros(1, 1, dtype=torch.long), torch.rand(16))


@pytest.fixture(scope="module")
def model():
    """Dense and sparse attention in bfloat16, of sizes that the kernels take."""
    model = MiniMaxM3VLForCausalLM(tiny_config(text=TEXT).text_config).eval()
    for number, parameter in enumerate(model.parameters()):
        scale = 0.3 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
        parameter.data = random(*parameter.shape, seed=number, scale=scale, dtype=torch.float32)
    return model.bfloat16().requires_grad_(False)


class TestAttentionLayers:
    """`_states_of_few_tokens` in place of `_states`: the same logits and caches, bit for bit."""

    @pytest.fixture
    def calls(self, monkeypatch):
        calls = pretend_kernels(monkeypatch)
        monkeypatch.setattr(few_tokens, "takes_mlp", lambda *args: False)  # sums of experts have another order
        return calls

    def decode(self, model, *, batch=2, num_new=1, padded=False, steps=3, cache=None):
        tokens = torch.randint(2, 400, (batch, 60), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(tokens)
        if padded:
            mask[0, :11] = 0
        cache = cache or StaticCache(config=model.config, max_cache_len=64)
        logits = [model(tokens[:, :40], attention_mask=mask[:, :40], cache=cache).logits[:, -1:]]
        for start in range(40, 40 + steps * num_new, num_new):
            stop = start + num_new
            logits.append(model(tokens[:, start:stop], attention_mask=mask[:, :stop], cache=cache).logits)
        states = [tensor.clone() for layer in cache.layers for tensor in (layer.keys, layer.values)]
        states += [layer.index_keys for layer in cache.layers if isinstance(layer, MiniMaxM3VLSparseStaticLayer)]
        return torch.cat(logits, dim=1), states, [int(layer.cumulative_length) for layer in cache.layers]

    def compare(self, model, monkeypatch, **options):
        found = self.decode(model, **options)
        with monkeypatch.context() as patch:
            set_kernels_take(patch, False)
            expected = self.decode(model, **options)
        assert torch.equal(found[0], expected[0])
        assert all(torch.equal(*pair) for pair in zip(found[1], expected[1], strict=True))
        assert found[2] == expected[2]

    @pytest.mark.parametrize("padded", [False, True], ids=["", "left padding"])
    @pytest.mark.parametrize("batch, num_new", [(1, 1), (4, 1), (2, 3), (4, 4), (16, 1)])
    def test_logits_and_caches(self, model, calls, monkeypatch, batch, num_new, padded):
        self.compare(model, monkeypatch, batch=batch, num_new=num_new, padded=padded)
        assert calls.count("attention_input") == 3 * model.config.num_hidden_layers

    def test_more_tokens(self, model, calls, monkeypatch):
        self.compare(model, monkeypatch, batch=3, num_new=6, steps=1)
        assert "attention_input" not in calls

    WATCHED = ("q_proj", "v_proj", "k_norm", "indexer", "indexer.k_proj", "indexer.q_norm")

    @pytest.mark.parametrize("name", WATCHED)
    def test_hooks(self, model, calls, monkeypatch, name):
        seen = []
        watched = model.model.layers[3].self_attn.get_submodule(name)
        handle = watched.register_forward_hook(lambda *args: seen.append(name))
        self.compare(model, monkeypatch)
        handle.remove()
        assert len(seen) == 2 * 4
        assert calls.count("attention_input") == 3 * (model.config.num_hidden_layers - 1)

    def test_norms_with_another_eps(self, model, calls, monkeypatch):
        norm = model.model.layers[3].self_attn.indexer.k_norm
        monkeypatch.setattr(norm, "eps", 0.5)
        self.compare(model, monkeypatch)
        assert calls.count("attention_input") == 3 * (model.config.num_hidden_layers - 1)

    def test_an_indexer_whose_projection_has_no_weight(self, model, calls, monkeypatch):
        """As quantized layers have none."""

        class Quantized(nn.Module):
            def __init__(self, linear):
                super().__init__()
                self.packed = nn.Buffer(linear.weight.data)

            def forward(self, x):
                return nn.functional.linear(x, self.packed)

        indexer = model.model.layers[3].self_attn.indexer
        projection = indexer.q_proj
        indexer.q_proj = Quantized(projection)
        try:
            self.compare(model, monkeypatch)
        finally:
            indexer.q_proj = projection
        assert calls.count("attention_input") == 3 * (model.config.num_hidden_layers - 1)

    def test_an_offloaded_cache_moves_its_layers_itself(self, model, calls, monkeypatch):
        updates = []
        cache = StaticCache(config=model.config, max_cache_len=64)
        cache.offloading = True
        monkeypatch.setattr(
            cache, "update", lambda *args: updates.append(args[2]) or cache.layers[args[2]].update(*args)
        )
        self.decode(model, cache=cache)
        assert "attention_input" not in calls and updates == list(range(model.config.num_hidden_layers)) * 4

    def test_gradients(self, model, calls):
        norm = model.model.layers[3].self_attn.k_norm
        norm.weight.requires_grad_()
        try:
            with torch.enable_grad():
                self.decode(model)
        finally:
            norm.weight.requires_grad_(False)
        assert calls.count("attention_input") == 3 * (model.config.num_hidden_layers - 1)


class TestStaticLayers:
    """Layers that count their tokens, and layers whose lender does."""

    def states(self, seed, num_new=1, heads=2):
        return random(2, heads, num_new, 64, seed=seed)

    @pytest.mark.parametrize("num_new", [1, 3])
    @pytest.mark.parametrize("counts", [True, False])
    def test_update_writes_the_next_slots(self, counts, num_new):
        layer = MiniMaxM3VLSparseStaticLayer(max_cache_len=12)
        layer.update(self.states(1, 5), self.states(2, 5))
        layer.update_index(self.states(3, 5, heads=1))
        layer.counts_tokens = counts
        counter = layer.cumulative_length
        before = [states.clone() for states in (layer.keys, layer.values, layer.index_keys)]
        new = [self.states(4, num_new), self.states(5, num_new), self.states(6, num_new, heads=1)]
        keys, values = layer.update(*new[:2])
        assert layer.cumulative_length is counter and int(counter) == (5 + num_new if counts else 5)
        index_keys = layer.update_index(new[2])
        assert layer.cumulative_length is counter and int(counter) == (5 + num_new if counts else 5)
        for old, found, states in zip(before, (keys, values, index_keys), new):
            assert torch.equal(found[:, :, 5 : 5 + num_new], states)
            old[:, :, 5 : 5 + num_new] = states
            assert torch.equal(found, old)

    @pytest.mark.parametrize("kind", [MiniMaxM3VLStaticLayer, MiniMaxM3VLSparseStaticLayer])
    def test_slots_are_the_layers_memory(self, kind):
        layer = kind(max_cache_len=12)
        layer.update(self.states(1, 5), self.states(2, 5))
        assert layer.slots().index_keys is None
        if kind is MiniMaxM3VLSparseStaticLayer:
            layer.update_index(self.states(3, 5, heads=1))
            assert layer.slots().index_keys.shape == (2, 12, 1, 64)
            assert layer.slots().index_keys.data_ptr() == layer.index_keys.data_ptr()
        slots = layer.slots()
        assert slots.keys.shape == slots.values.shape == (2, 12, 2, 64) and slots.keys.is_contiguous()
        assert slots.keys.data_ptr() == layer.keys.data_ptr() and slots.length is layer.cumulative_length
        layer.count_tokens(3)
        assert int(layer.get_seq_length()) == 8
        layer.counts_tokens = False
        layer.count_tokens(3)
        assert int(slots.length) == 8


def tolerances(case):
    """For each output: one and a half times the error of PyTorch in half precision."""
    query, index_query, new = case.exact()
    other = case.copy_of_slots()
    found = case.call(attention_input_reference, other)
    length, num_new = int(case.slots.length), case.projected.shape[1]
    parts = [found[0], found[1], *(states[:, length : length + num_new] for states in other[1:] if states is not None)]
    exact = [query, index_query, *new]
    return [1.5 * relative_error(part, states) + 1e-6 for part, states in zip(parts, exact)]


# heads, key/value heads, head_dim, rotary channels, index
GEOMETRIES = [(4, 2, 64, 32, True), (4, 2, 64, 64, False), (3, 1, 64, 16, True), (5, 2, 128, 64, True)]
GEOMETRIES += [(1, 1, 128, 128, False), (2, 2, 64, 48, False), (7, 3, 128, 16, True), (64, 4, 128, 64, True)]
GEOMETRIES += [(2, 1, 64, 16, True), (16, 1, 128, 96, True)]


class TestKernel:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    @pytest.mark.parametrize("rotary_dtype", [None, torch.float32], ids=["half", "float32"])
    @pytest.mark.parametrize(
        "batch, num_new", [(1, 1), (2, 1), (3, 1), (7, 1), (16, 1), (1, 2), (3, 3), (2, 4), (4, 4)]
    )
    @pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
    def test_values(self, geometry, batch, num_new, rotary_dtype, dtype):
        for rotary_rows, strided in ((None, False), (1, True)):
            options = {"rotary_rows": rotary_rows, "strided": strided, "rotary_dtype": rotary_dtype, "dtype": dtype}
            case = Case(batch, num_new, *geometry, **options, device="cuda")
            assert case.takes()
            limits = tolerances(case)
            exact_query, exact_index, new = case.exact()
            before = [states.clone() for states in case.caches]
            poison(exact_query.to(dtype))
            poison(exact_index.to(dtype))
            query, index_query = case.call(attention_input)
            assert query.shape == exact_query.shape and index_query.shape == exact_index.shape
            assert query.dtype == index_query.dtype == dtype
            assert relative_error(query, exact_query) <= limits[0]
            assert not index_query.numel() or relative_error(index_query, exact_index) <= limits[1]
            check_slots(before, case.caches, new, 5, limits[2:])
            again = case.call(attention_input)
            assert torch.equal(query, again[0]) and torch.equal(index_query, again[1])

    def test_neighbours_in_memory(self):
        """Nothing beside the new slots is written, of a cache that lies inside of a larger buffer."""
        case = Case(2, 2, strided=True, device="cuda")
        whole = case.slots.keys._base
        before = whole.clone()
        case.call(attention_input)
        inner = before[1:, :, 2:14, :64].transpose(1, 2)
        inner[:, 5:7] = case.slots.keys[:, 5:7]
        assert torch.equal(whole, before)

    @pytest.mark.parametrize("length, slot", [(11, 12), (2**40, 2**40), (-1, -1)])
    def test_full_cache(self, length, slot):
        """In a process of its own, which cannot use the GPU afterwards."""
        code = (
            "import torch\n"
            "from modeling_minimax_m3.fused.attention_input import attention_input\n"
            "from modeling_minimax_m3.msa import extension\n"
            "from tests.fused.test_attention_input import Case\n"
            "assert extension.load(build=False) is None\n"
            f"case = Case(3, 2, length={length}, device='cuda')\n"
            "case.call(attention_input)\n"
            "torch.cuda.synchronize()\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode != 0
        assert f"the static cache has 12 slots, got a token for slot {slot}" in done.stdout + done.stderr

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_special_values(self, dtype):
        """Zero heads stay zero; NaN and infinity stay in their head."""
        case = Case(2, 2, dtype=dtype, device="cuda")
        heads = case.projected.unflatten(-1, (-1, 64))
        heads[0, 0, 0] = 0
        heads[0, 1, 1, 3] = math.nan
        heads[1, 0, 2, 40] = math.inf
        heads[1, 1, 5] = math.inf  # a key
        heads[1, 1, 7, 2] = math.nan  # a value
        other = case.copy_of_slots()
        expected = case.call(attention_input_reference, other)
        found = case.call(attention_input)
        assert not found[0][0, 0, 0].any()
        for states, reference in zip((*found, *case.caches), (*expected, *other[1:])):
            assert torch.equal(states.isnan(), reference.isnan())
            torch.testing.assert_close(states, reference, rtol=3e-2, atol=3e-2, equal_nan=True)

    @pytest.mark.parametrize("num_new", [1, 3])
    def test_captured_in_a_graph(self, num_new):
        case = Case(2, num_new, num_slots=40, device="cuda")
        twin = Case(2, num_new, num_slots=40, device="cuda")

        def step(case):
            out = case.call(attention_input)
            case.slots.length.add_(num_new)
            return out

        graph, out = captured(lambda: step(case))
        case.slots.length.fill_(5)
        for states, others in zip(case.caches, twin.caches):
            states.copy_(others)
        for seed in range(1, 9):
            fresh = Case(2, num_new, device="cuda", seed=100 * seed)
            for target in (case, twin):
                target.projected.copy_(fresh.projected)
                for table, values in zip(target.rotary, fresh.rotary):
                    table.copy_(values)
            graph.replay()
            expected = step(twin)
            assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])
        assert int(case.slots.length) == int(twin.slots.length) == 5 + 8 * num_new
        assert all(torch.equal(*pair) for pair in zip(case.caches, twin.caches))

    def test_kernels_behind_each_other(self):
        """200 tokens: projections, this kernel and the output projection, each launched before the last has ended."""
        batch, hidden = 3, 256
        shapes = {"projections": (4 * 64 + 2 * 2 * 64 + 3 * 64, hidden), "output": (hidden, 4 * 64)}
        weights = {
            name: random(*shape, scale=shape[1] ** -0.5, seed=len(name), device="cuda")
            for name, shape in shapes.items()
        }
        tables = [Case(batch, device="cuda", seed=seed).rotary for seed in range(200)]

        def run(waits):
            case = Case(batch, length=0, num_slots=200, device="cuda")
            x, outs = random(batch, 1, hidden, device="cuda"), []
            for case.rotary in tables:
                case.projected = few_tokens.product(x, weights["projections"])
                query, index_query = case.call(attention_input)
                case.slots.length.add_(1)
                x = few_tokens.product(query.flatten(2), weights["output"])
                outs += [query.clone(), index_query.clone()]
                if waits:
                    torch.cuda.synchronize()
            return outs, case.caches

        expected, expected_caches = run(waits=True)
        assert all(states.isfinite().all() for states in expected_caches)
        for _ in range(3):
            found, caches = run(waits=False)
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
            assert all(torch.equal(*pair) for pair in zip(caches, expected_caches, strict=True))

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    @pytest.mark.parametrize("shape", [(1, 1), (16, 1), (3, 5), (2, 1000)], ids=str)
    @pytest.mark.parametrize("channels, scaling", [(16, 1.0), (64, 1.25), (128, 1.0)])
    def test_rotary_table(self, channels, scaling, shape, dtype):
        x = torch.zeros(1, dtype=dtype, device="cuda")
        generator = torch.Generator().manual_seed(channels)
        frequencies = (5e6 ** -(torch.arange(0, channels, 2) / channels)).cuda()
        positions = torch.randint(0, 2**20, shape, generator=generator).cuda()
        positions[0, 0] = 0
        assert takes_rotary_table(x, positions, frequencies)
        poison(torch.empty(*shape, channels, dtype=dtype, device="cuda"))
        tables = rotary_table(x, positions, frequencies, scaling)
        for table, expected in zip(tables, rotary_table_reference(x, positions, frequencies, scaling)):
            assert table.dtype == dtype and table.shape == (*shape, channels)
            # A last place of float32 may move the rounding to a neighbour.
            assert (table != expected).float().mean() < 1e-2
            torch.testing.assert_close(table, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        for strided in (positions.T.contiguous().T, positions.repeat_interleave(2, dim=1)[:, ::2]):
            assert torch.equal(rotary_table(x, strided, frequencies, scaling)[1], tables[1])
        assert rotary_table(x, positions[:0], frequencies, scaling)[0].shape == (0, shape[1], channels)
