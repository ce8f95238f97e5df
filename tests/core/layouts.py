"""Inputs of a layer as models make them, views of all kinds."""

import torch

OUT, IN = 128, 256


def layouts(device="cpu"):
    """Inputs of IN features, by what is odd about them."""
    dense = torch.randn(2, 6, 4, IN, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    wide = torch.randn(3, 4, 2 * IN, generator=torch.Generator().manual_seed(2)).to(device, torch.bfloat16)
    image = dense[:1].permute(0, 3, 1, 2).contiguous()  # as a convolution leaves it: N, C, H, W
    return {
        "one row": dense[0, 0, 0],
        "two dimensions": dense[0, 0],
        "three": dense[0],
        "four": dense,
        "transposed": dense[0, 0].t().contiguous().t(),
        "an image as rows": image.permute(0, 2, 3, 1).reshape(1, 24, IN),
        "an image, channels last": image.permute(0, 2, 3, 1),
        "half of each row": wide[..., :IN],
        "each other value": wide[..., ::2],
        "each other row": wide[:, ::2, :IN],
        "one row many times": dense[0, 0, :1].expand(5, IN),
    }


def off(layer, given):
    """How far a layer of OUT features is on a view from itself on the same rows in memory, relatively."""
    rows = given.reshape(-1, IN).clone(memory_format=torch.contiguous_format)
    expected, found = layer(rows).reshape(*given.shape[:-1], OUT), layer(given)
    assert found.shape == expected.shape
    return (found - expected).norm() / expected.norm()
