"""Models whose activations pass fp16's range, as those trained in bf16 may: each changes a random model in place and
returns it."""

import torch
from torch import nn


@torch.no_grad()
def loud_stream(model, size, gate=1.0):
    """Push the residual stream to about ``size * gate``: the gates and outputs of the first block, as trained outlier
    channels do."""
    block = model.transformer_blocks[0]
    block.ff.net[2].weight[3] *= size
    block.ff.net[2].bias[3] = size
    block.norm2.linear.bias += gate
    return model


@torch.no_grad()
def loud_inner(model, size):
    """Push the inner activations of the feed-forwards to about ``size``, and the weights after them down by as much."""
    for block in model.transformer_blocks:
        block.ff.net[0].proj.weight[:8] *= size
        block.ff.net[2].weight[:, :8] /= size
    return model


@torch.no_grad()
def outlier_channels(model):
    """A few rows and columns a thousand times the others, up and down, and one row beyond fp16's range."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")):
            module.weight[0] *= 1e3
            module.weight[1] *= 1e-3
            module.weight[:, 2] *= 1e2
    model.transformer_blocks[0].attn1.to_v.weight[5] = 1e5
    model.transformer_blocks[0].attn1.to_out[0].weight[:, 5] = 1e-8
    return model


@torch.no_grad()
def loud_values(model, size):
    """Push the attention's values to about ``size``."""
    for block in model.transformer_blocks:
        block.attn1.to_v.weight[:16] *= size
        block.attn1.to_out[0].weight[:, :16] /= size
    return model


@torch.no_grad()
def loud_norms(model):
    """q and k norms whose weights would carry q beyond fp16, and whose logits stay moderate."""
    for block in model.transformer_blocks:
        block.attn1.norm_q.weight *= 2e5
        block.attn1.norm_k.weight *= 5e-6
    return model


@torch.no_grad()
def loud_t5(model, size_stream, size_inner):
    """Push T5's residual stream to about ``size_stream`` and the inner activations of its feed-forwards to about
    ``size_inner`` squared."""
    dense = model.encoder.block[0].layer[1].DenseReluDense
    dense.wo.weight[3] = size_stream
    for block in model.encoder.block:
        ff = block.layer[1].DenseReluDense
        ff.wi_0.weight[:4] *= size_inner
        ff.wi_1.weight[:4] *= size_inner
        ff.wo.weight[:, :4] /= size_inner**2
    return model
