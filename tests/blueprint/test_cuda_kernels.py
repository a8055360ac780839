"""A capture for CUDA counts the kernels that CUDA would choose; without a GPU it is held to what those kernels are
known to save.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from meshwright.blueprint.inspection import inspect
from meshwright.errors import ModelError
from meshwright.models import decoder

TOKENS = torch.zeros(2, 32, dtype=torch.long)


def names(unit) -> set[str]:  # type: ignore[no-untyped-def]
    return {op.name.removeprefix("aten.").partition(".")[0] for op in (*unit.forward, *unit.backward)}


def test_attention_and_norms_are_single_kernels() -> None:
    blueprint = inspect("llama:layers=2,hidden=64,heads=4,kv_heads=2", seq=32, dtype=torch.bfloat16, device="cuda")
    found = names(blueprint.kinds[0])
    assert {"_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"} <= found
    assert {"_fused_rms_norm", "_fused_rms_norm_backward"} <= found
    assert not {"rsqrt", "_softmax", "_safe_softmax"} & found
    assert blueprint.kinds[0].regions[0].units == 2
    assert blueprint.device == "cuda"


@pytest.mark.parametrize("reason", ["mask", "dropout", "widths", "float32"])
def test_the_kernel_depends_on_what_cuda_supports(reason: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.v = nn.Linear(32, 32), nn.Linear(32, 16 if reason == "widths" else 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in (self.q(x), self.v(x)))
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() if reason == "mask" else None
            y = F.scaled_dot_product_attention(q, q, v, attn_mask=mask, dropout_p=0.1 if reason == "dropout" else 0.0)
            return x + F.pad(y.transpose(1, 2).flatten(2), (0, 32 - v.shape[1] * v.shape[3]))

    dtype = torch.float32 if reason == "float32" else torch.bfloat16
    found = names(inspect(nn.Sequential(Block(), Block()), torch.randn(2, 8, 32), dtype=dtype, device="cuda").kinds[0])
    flash = "_scaled_dot_product_flash_attention" in found
    assert flash == (reason == "dropout")
    assert ("_scaled_dot_product_efficient_attention" in found) == (not flash)


def test_saved_bytes_of_a_llama_block_by_hand() -> None:
    """What each kernel keeps per token, in 16 bit but for the float32 sums."""
    hidden, ffn, heads, tokens = 64, 128, 4, 32
    model = decoder.Decoder(decoder.llama(layers=3, hidden=hidden, heads=heads, ffn=ffn, vocab=64))
    unit = inspect(model, TOKENS, dtype=torch.bfloat16, device="cuda").kinds[-1]
    norms = 2 * (2 * hidden + 2 * hidden + 4)  # input, output (a matrix's operand) and root, twice
    attention = 5 * 2 * hidden + 4 * heads  # q, k, v, out, out in token order for the next matrix; log-sum-exp
    gated = 4 * 2 * ffn  # gate, its SiLU, up, their product
    tables = 2 * 2 * model.config.sequence * 16 // 2  # cosines and sines: whole storages, not per token
    kept = sum(s.bytes.at(1) for s in unit.saved if s.role in ("activation", "input") and not s.output)
    assert 0 <= kept - tables - tokens * (norms + attention + gated) < 64  # the random state of one attention


def test_unknown_devices_are_refused() -> None:
    with pytest.raises(ModelError, match="'tpu'"):
        inspect("gpt-tiny", device="tpu")


@pytest.mark.cuda
def test_saved_bytes_equal_a_run_on_the_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs one CUDA device")
    config = decoder.llama(layers=2, hidden=256, heads=4, ffn=512, vocab=256, sequence=128)
    tokens = torch.zeros(2, 128, dtype=torch.long)
    blueprint = inspect(decoder.Decoder(config), tokens, dtype=torch.bfloat16, device="cuda")
    model = decoder.Decoder(config).cuda().bfloat16()
    state = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in state:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    given = tokens.cuda()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = model(given)
    del saved[given.untyped_storage().data_ptr()]
    assert kept.requires_grad
    assert blueprint.saved_bytes(2) == pytest.approx(sum(saved.values()), rel=1e-3)  # random state aside
