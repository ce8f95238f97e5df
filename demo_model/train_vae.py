"""Train the VAE on paintings: all of it, or only the decoder at unchanged latents."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from .components import build_vae
from .dataset import Paintings
from .schedule import Average, Clock, set_rate

KL_WEIGHT = 2e-4
OBJECT_WEIGHT = 4.0
"""How much more a pixel counts where there is an object."""
WEIGHT_CELL = 4
"""Pixels a side of the cells that the weights are kept in."""
DECODER_NOISE = 0.1
"""Standard deviation of the noise on latents when only the decoder learns: samplers do not hit latents exactly."""


def picture_loss(error: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the weighted loss of an error image [batch, 3, size, size]; weight is [batch, 1, size, size].

    It is the absolute error, the squared error and the absolute difference of neighbouring errors, which blur
    makes large.
    """
    across = (error[..., 1:] - error[..., :-1]).abs() * weight[..., 1:]
    down = (error[..., 1:, :] - error[..., :-1, :]).abs() * weight[..., 1:, :]
    return ((error.abs() + error.pow(2)) * weight).mean() + across.mean() + down.mean()


@torch.no_grad()
def peak_signal_to_noise(vae: AutoencoderKL, paintings: Paintings) -> float:
    """Return the PSNR in dB of reconstructed paintings, over all pixels, for a signal range of 2."""
    squares = 0.0
    for chunk in paintings.chunks():
        image = paintings.images(chunk)
        decoded = vae.decode(vae.encode(image.to(vae.dtype)).latent_dist.mean).sample.float().clamp(-1, 1)
        squares += (decoded - image).pow(2).mean().item() / len(paintings.chunks())
    return 10 * math.log10(4 / squares)


def train_vae(
    out: Path,
    resume: Path | None,
    minutes: float,
    paintings: Paintings,
    fresh: Paintings,
    batch: int,
    device: str,
    decoder_only: bool,
    rate: float,
) -> None:
    """Train for `minutes`, measure the PSNR on `fresh` paintings and write out/pipeline/vae in bfloat16."""
    vae = build_vae(resume, paintings.size).to(device)
    encoder, decoder = vae.encoder.requires_grad_(not decoder_only), vae.decoder
    average = Average(vae, 0.995)
    optimizer = torch.optim.AdamW(
        [p for p in vae.parameters() if p.requires_grad], lr=rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    weight = 1 + OBJECT_WEIGHT * paintings.coverage(WEIGHT_CELL)[:, None]
    weight = weight / weight.mean()
    before = peak_signal_to_noise(vae, fresh)
    clock, step = Clock(minutes), 0
    clock.log("vae", round(before, 2), "dB before")
    while clock.progress < 1:
        index = torch.randint(0, paintings.count, (batch,), device=device)
        image = paintings.images(index)
        with torch.autocast(device, torch.bfloat16):
            mean, logvar = encoder(image).float().chunk(2, dim=1)
            spread = DECODER_NOISE if decoder_only else (0.5 * logvar.clamp(-30, 20)).exp()
            decoded = decoder(mean + spread * torch.randn_like(mean))
        error = decoded.float() - image
        loss = picture_loss(error, F.interpolate(weight[index], scale_factor=WEIGHT_CELL))
        if not decoder_only:
            loss = loss + KL_WEIGHT * 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        set_rate(optimizer, rate, step, clock.progress)
        optimizer.step()
        average.update(vae)
        step += 1
        if step % 50 == 0:
            signal = 10 * math.log10(4 / error.pow(2).mean().item())
            clock.log("vae", step, "loss", round(loss.item(), 4), "psnr", round(signal, 2))
        if step % 300 == 0:
            torch.save(average.module.state_dict(), out / "vae.pt")
    vae = average.module
    torch.save(vae.state_dict(), out / "vae.pt")
    if not decoder_only:
        with torch.no_grad():
            latents = vae.encode(fresh.images(slice(None))).latent_dist.mean
        vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    clock.log("vae", step, "steps;", round(peak_signal_to_noise(vae, fresh), 2), "dB")
    vae.to(torch.bfloat16).save_pretrained(out / "pipeline" / "vae")
