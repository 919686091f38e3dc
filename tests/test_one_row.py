"""A linear layer that reads one row faster, against the product in float64."""

import pytest
import torch
import torch.nn as nn
from other_programs import make_model

from layers import one_row
from layers.one_row import LARGE, OneRowLinear, read_one_row_faster, times_one_row
from text.tokenizer import SPECIAL_TOKENS


@pytest.mark.parametrize(("n_in", "n_out"), [(384, 512), (300, 601), (512, 256), (40, 64)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_of_one_row_is_its_product_in_float64(n_in, n_out, bias, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(n_in, n_out, bias=bias).to(dtype)
    layer, whole = OneRowLinear(linear), torch.randn(3, 7, n_in, dtype=dtype)
    assert layer.is_cut == (n_in * n_out >= LARGE and n_out % 4 == 0)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for x in (whole, whole[1:2, -1], whole[2, 3], whole[:1, :1], whole[1, :1, None]):  # rows far apart, too
        exact = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
        y = layer(x)
        assert y.dtype == dtype and y.shape == (*x.shape[:-1], n_out)
        torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)
    y = times_one_row(layer.weight, whole[0, 0])
    torch.testing.assert_close(y.double(), linear.weight.double() @ whole[0, 0].double(), rtol=1e-5, atol=1e-5)


def test_a_model_says_the_same(monkeypatch):
    monkeypatch.setattr(one_row, "LARGE", 1)
    model, faster = (make_model(48 + len(SPECIAL_TOKENS), n_layer=2, bias=True) for _ in range(2))
    faster.load_state_dict(model.state_dict())
    read_one_row_faster(faster)
    assert faster.lm_head.is_cut is (faster.lm_head.out_features % 4 == 0)
    assert faster.state_dict().keys() == model.state_dict().keys()
    assert faster.lm_head.weight is faster.token_embedding.weight  # tied still
    idx = torch.randint(48, (1, 9))
    tokens = torch.stack(list(faster.generate(idx, 40, temperature=0.0)))
    assert torch.equal(tokens, torch.stack(list(model.generate(idx, 40, temperature=0.0))))
