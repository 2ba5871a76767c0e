"""A reference for variable-length attention, so that the code path of CUDA runs on a CPU.

torch's `torch.nn.attention.varlen.varlen_attn` calls two documented operators, torch_attn::_varlen_attn
and its backward, that have CUDA kernels only. Importing this file registers kernels for the CPU. They
compute in float32, one sequence after the other, with the whole matrix of scores: obviously right
rather than fast. They refuse what the CUDA kernel (FlashAttention 2) refuses or silently computes
wrongly, but take float32 as well, which lets a test compare results to many digits.

T  query tokens    H  query heads    d  size of a head
U  key tokens      K  key heads

    import reference_varlen  # in a test; nothing else is to be done
"""

import torch
from torch import Tensor
from torch.nn.attention import varlen  # noqa: F401  (it defines the two operators)


def sequences(cu_seq_q: Tensor, cu_seq_k: Tensor) -> list[tuple[slice, slice]]:
    """For every sequence where its queries and its keys stand."""
    queries, keys = (
        map(slice, ends[:-1], ends[1:]) for ends in (cu_seq_q.tolist(), cu_seq_k.tolist())
    )
    return list(zip(queries, keys, strict=True))


def visible(queries: int, keys: int, is_causal: bool) -> Tensor:
    """Which of the keys each query sees, [queries, keys]: the last query stands at the last key."""
    seen = torch.ones(queries, keys, dtype=torch.bool)
    return seen.tril(keys - queries) if is_causal else seen


def check(query, key, value, cu_seq_q, cu_seq_k, max_q: int, max_k: int, used, window) -> None:
    """ValueError for what the CUDA kernel does not take, or would take and compute wrongly, and for what the
    repository has no use of."""

    def require(right: bool, what: str) -> None:
        if not right:
            raise ValueError(what)

    require(query.dtype == key.dtype == value.dtype, "types")
    require(query.shape[2] % 8 == 0 and query.shape[2] <= 256, "head size")
    require(all(x.stride(-1) == 1 for x in (query, key, value)), "heads must be contiguous")
    require(
        used is None and window in ([-1, -1], [-1, 0]), f"the reference knows no window {window}"
    )
    for index in (cu_seq_q, cu_seq_k):
        require(index.dtype == torch.int32 and index.is_contiguous(), "want int32, contiguous")
    require(len(cu_seq_q) == len(cu_seq_k), "as many sequences of queries as of keys")
    require(cu_seq_q[-1] == len(query), f"{len(query)} queries end at {cu_seq_q[-1]}")
    require(cu_seq_k[-1] == len(key), f"{len(key)} keys end at {cu_seq_k[-1]}")
    require(max(cu_seq_q.diff()) <= max_q, f"more queries than {max_q}")
    require(max(cu_seq_k.diff()) <= max_k, f"more keys than {max_k}")
    require(all(cu_seq_q.diff() <= cu_seq_k.diff()), "a query without keys")


@torch.library.register_kernel("torch_attn::_varlen_attn", "cpu")
@torch.autocast("cpu", enabled=False)
def attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None,
              window_size=None, enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip
    """query [T, H, d], key and value [U, K, d] -> output [T, H, d] in the query's type, the
    logarithms of the softmaxes' normalisers [H, T] in float32, and the state of a random generator
    that is not used."""
    check(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, seqused_k, window_size)
    tokens, heads, size = query.shape
    out, lse = torch.zeros(query.shape), torch.zeros(heads, tokens)
    for queries, keys in sequences(cu_seq_q, cu_seq_k):
        seen = visible(queries.stop - queries.start, keys.stop - keys.start, is_causal)
        # Every key head serves as many query heads, one after the other.
        repeats = heads // key.shape[1]
        k, v = (x[keys].float().repeat_interleave(repeats, dim=1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[queries].float(), k) * size**-0.5
        scores = scores.masked_fill(~seen, float("-inf"))
        out[queries] = torch.einsum("hqk,khd->qhd", scores.softmax(2), v)
        lse[:, queries] = scores.logsumexp(2)
    return out.to(query.dtype), lse, torch.zeros(2, dtype=torch.uint64)


@torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu")
def attention_backward(grad_out, query, key, value, out, lse, cu_seq_q, cu_seq_k, max_q, max_k,
                       is_causal, rng_state, scale=None, window_size=None):  # fmt: skip
    """The gradients of query, key and value, each in its type."""
    heads, size = query.shape[1:]
    grads = [torch.zeros(x.shape) for x in (query, key, value)]
    for queries, keys in sequences(cu_seq_q, cu_seq_k):
        seen = visible(queries.stop - queries.start, keys.stop - keys.start, is_causal)
        for head in range(heads):
            of_head = head // (heads // key.shape[1])
            q, grad, result = (x[queries, head].float() for x in (query, grad_out, out))
            k, v = (x[keys, of_head].float() for x in (key, value))
            scores = (q @ k.T * size**-0.5).masked_fill(~seen, float("-inf"))
            weights = (scores - lse[head, queries, None]).exp()
            grad_scores = weights * (grad @ v.T - (grad * result).sum(dim=1, keepdim=True))
            grads[0][queries, head] += grad_scores @ k * size**-0.5
            grads[1][keys, of_head] += grad_scores.T @ q * size**-0.5
            grads[2][keys, of_head] += weights.T @ grad
    return tuple(grad.to(query.dtype) for grad in grads)
