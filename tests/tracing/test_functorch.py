"""The private names of torch.vmap's tensors do what we use them for."""

import torch

from modsurg.tracing.functorch import count_mapped, is_transforming, is_wrapped, unwrap_tensor


def test_a_wrapped_tensor_is_told_apart_and_unwrapped():
    seen = []

    def look(x):
        seen.append((is_wrapped(x), is_transforming(), tuple(unwrap_tensor(x).shape), count_mapped([[x], 3])))
        return x

    outer = torch.zeros(5, 3, 2)
    torch.vmap(torch.vmap(look))(outer)
    assert seen == [(True, True, (5, 3, 2), 15)]
    assert (is_wrapped(outer), is_transforming(), count_mapped([outer])) == (False, False, 1)
    assert unwrap_tensor(outer) is outer
