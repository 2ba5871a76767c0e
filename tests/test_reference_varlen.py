"""tests/reference_varlen.py against a dense softmax under a mask, and what it refuses.

python -m pytest tests/test_reference_varlen.py
"""

import pytest
import reference_varlen  # noqa: F401  (it registers the kernels)
import torch
from torch.nn.attention.varlen import AuxRequest, varlen_attn

FULL, CAUSAL = (-1, -1), (-1, 0)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def tensors(queries: int, keys: int, heads=1, key_heads=1) -> list[torch.Tensor]:
    """query [T, H, 8], key and value [U, K, 8], all of which want a gradient."""
    noise = torch.Generator().manual_seed(0)
    shapes = (queries, heads, 8), (keys, key_heads, 8), (keys, key_heads, 8)
    return [torch.randn(shape, generator=noise).requires_grad_() for shape in shapes]


def dense(q, k, v, spans: list[tuple[int, int, int, int]], causal: bool):
    """The same attention by one mask over all tokens; spans: where the queries and keys of a
    sequence begin and end. Returns the output [T, H, d] and the normalisers [H, T]."""
    mask = torch.zeros(len(q), len(k), dtype=torch.bool)
    for q0, q1, k0, k1 in spans:
        for i in range(q0, q1):
            mask[i, k0 : k1 - (q1 - 1 - i) if causal else k1] = True
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)


@pytest.mark.parametrize("window", [FULL, CAUSAL])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_outputs_normalisers_and_gradients_are_those_of_a_dense_softmax(window, key_heads):
    # All of a sequence, the end of a longer one (a completion over its prompt), a single query.
    spans = [(0, 3, 0, 3), (3, 5, 3, 9), (5, 6, 9, 13)]
    ends, how = (int32(0, 3, 5, 6), int32(0, 3, 9, 13)), dict(window_size=window, enable_gqa=True)
    inputs = tensors(6, 13, 4, key_heads)
    weight = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(1))
    out, lse = varlen_attn(*inputs, *ends, 3, 6, **how, return_aux=AuxRequest(lse=True))
    wanted, wanted_lse = dense(*inputs, spans, causal=window == CAUSAL)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)
    gradients = torch.autograd.grad((out * weight).sum(), inputs)
    for got, right in zip(gradients, torch.autograd.grad((wanted * weight).sum(), inputs)):
        torch.testing.assert_close(got, right)
    # In bfloat16 the same is computed in float32, and rounded once.
    inputs = [x.detach().bfloat16() for x in inputs]
    wanted, _ = dense(*(x.float() for x in inputs), spans, causal=window == CAUSAL)
    assert torch.equal(varlen_attn(*inputs, *ends, 3, 6, **how), wanted.bfloat16())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cu_seq_q": torch.tensor([0, 2, 4])}, "int32"),
        ({"max_q": 1}, "more queries than 1"),
        ({"max_k": 1}, "more keys than 1"),
        ({"cu_seq_q": int32(0, 2, 3)}, "end at 3"),
        ({"cu_seq_k": int32(0, 2, 5)}, "end at 5"),
        ({"cu_seq_k": int32(0, 1, 4), "max_k": 3}, "a query without keys"),
        ({"seqused_k": int32(1, 1)}, "knows no"),
    ],
)
def test_what_the_kernel_would_compute_wrongly_is_refused(change, message):
    q, k, v = (x.detach() for x in tensors(4, 4))
    good = dict(cu_seq_q=int32(0, 2, 4), cu_seq_k=int32(0, 2, 4), max_q=2, max_k=2)
    varlen_attn(q, k, v, **good)
    with pytest.raises(ValueError, match=message):
        varlen_attn(q, k, v, **good | change)
