"""Train the flow: the transformer and both text encoders together, on the VAE's latents of paintings."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import nn

from .captions import SHORT, Captions
from .components import build_clip, build_t5, build_transformer, build_vae
from .dataset import Paintings
from .schedule import Average, Clock, set_rate
from .vocabulary import load_tokenizers

CELL = 16
"""Pixels a side that one latent token stands for."""
OBJECT_WEIGHT = 4.0
"""How much more a token counts that an object covers: objects are few, and the plain error hardly notices them."""
LONG_EVERY = 24
LONG = (128, 512)
"""Every LONG_EVERY-th step pads its captions to one of these lengths, so that padding changes nothing."""
WORDINGS = 4
FUSED_ATTENTION = F.scaled_dot_product_attention
AVERAGE_DECAY = 0.998
ADAMW_SHARE = 0.5
"""AdamW's learning rate for embeddings, biases and the outermost layers, as a share of Muon's."""


class Flow(nn.Module):
    """The transformer with its text encoders: predicts the velocity from data to noise."""

    def __init__(self, clip: nn.Module, t5: nn.Module, transformer: nn.Module, grid: int) -> None:
        super().__init__()
        self.clip, self.t5, self.transformer = clip, t5, transformer
        positions = FluxPipeline._prepare_latent_image_ids(1, grid, grid, "cpu", torch.float32)
        self.register_buffer("positions", positions, persistent=False)

    def forward(
        self, latents: torch.Tensor, sigma: torch.Tensor, clip_ids: torch.Tensor, t5_ids: torch.Tensor
    ) -> torch.Tensor:
        """Return the velocity [batch, tokens, 64] of noised packed latents at noise levels `sigma` [batch]."""
        context = self.t5(input_ids=t5_ids).last_hidden_state
        return self.transformer(
            hidden_states=latents,
            timestep=sigma,
            encoder_hidden_states=context,
            pooled_projections=self.clip(input_ids=clip_ids).pooler_output,
            txt_ids=torch.zeros(t5_ids.shape[1], 3, device=latents.device),
            img_ids=self.positions,
            return_dict=False,
        )[0]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: object,
) -> torch.Tensor:
    """Attend as PyTorch's function of the same arguments does, in plain operations unless there is a mask."""
    if attn_mask is not None or is_causal:
        return FUSED_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, **options)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return scores.softmax(-1).to(value.dtype) @ value


@contextmanager
def plain_attention() -> Iterator[None]:
    """Replace PyTorch's fused attention, whose backward pass takes a third of a training step on CPUs."""
    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = FUSED_ATTENTION


def agree(parameters: list[nn.Parameter], *numbers: float) -> list[float]:
    """Average gradients, and some numbers with them, over all training processes in place; returns the numbers."""
    if not dist.is_initialized():
        return list(numbers)
    grads = [parameter.grad for parameter in parameters]
    flat = torch.cat([grad.flatten() for grad in grads] + [torch.tensor(numbers, device=grads[0].device)])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, part in zip(grads, flat[: -len(numbers)].split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))
    return flat[-len(numbers) :].tolist()


@torch.no_grad()
def packed_latents(vae: AutoencoderKL, paintings: Paintings) -> torch.Tensor:
    """Encode all paintings as the transformer sees them, [count, tokens, 64] in bfloat16."""
    parts = []
    side = paintings.size // 8
    for chunk in paintings.chunks():
        with torch.autocast(paintings.pixels.device.type, torch.bfloat16):
            mean = vae.encode(paintings.images(chunk)).latent_dist.mean.float()
        scaled = (mean - vae.config.shift_factor) * vae.config.scaling_factor
        parts.append(FluxPipeline._pack_latents(scaled, len(mean), mean.shape[1], side, side).bfloat16())
    return torch.cat(parts)


def hidden_matrices(flow: Flow) -> Iterator[tuple[str, nn.Parameter]]:
    """Name the weight matrices inside the blocks, which Muon trains; all else is AdamW's."""
    for name, module in flow.named_modules():
        inside = "transformer_blocks." in name or ".layers." in name or ".block." in name
        if inside and isinstance(module, nn.Linear):
            yield f"{name}.weight", module.weight


def build_optimizers(flow: Flow) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Make Muon for the hidden matrices, with steps as long as AdamW's would be, and AdamW for the rest."""
    hidden = dict(hidden_matrices(flow))
    rest = [parameter for name, parameter in flow.named_parameters() if name not in hidden]
    muon = torch.optim.Muon(list(hidden.values()), weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return muon, torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0)


def draw_sigma(batch: int, device: str) -> torch.Tensor:
    """Draw noise levels: mostly logit-normal around 0.57, now and then uniform, in (0, 1]."""
    sigma = torch.sigmoid(torch.randn(batch, device=device) * 1.1 + 0.3)
    anywhere = torch.rand(batch, device=device) < 0.15
    return torch.where(anywhere, torch.rand(batch, device=device), sigma).clamp(1e-3, 1.0)


def save(flow: Flow, average: Average, vae: AutoencoderKL, tokenizers: tuple, out: Path) -> None:
    """Write a float32 checkpoint and, in bfloat16, out/pipeline with the averaged weights."""
    torch.save({"flow": flow.state_dict(), "average": average.module.state_dict()}, out / "flow.pt")
    averaged = copy.deepcopy(average.module).to(torch.bfloat16)
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=2.0),
        vae=copy.deepcopy(vae).to(torch.bfloat16),
        text_encoder=averaged.clip,
        tokenizer=tokenizers[0],
        text_encoder_2=averaged.t5,
        tokenizer_2=tokenizers[1],
        transformer=averaged.transformer,
    ).save_pretrained(out / "pipeline")


def train_flow(
    out: Path,
    resume: Path | None,
    minutes: float,
    paintings: Paintings,
    batch: int,
    device: str,
    rate: float,
    seed: int,
    rank: int,
) -> None:
    """Train for `minutes` on the latents of out/pipeline/vae and write the rest of out/pipeline in bfloat16."""
    vae = build_vae(out, paintings.size).to(device)
    tokenizers = load_tokenizers(resume)
    # tokenizers keep the padding of their last use, which does not belong into their files
    captions = Captions(paintings.scenes, *copy.deepcopy(tokenizers), WORDINGS, seed + rank, device)
    data = packed_latents(vae, paintings)
    weight = 1 + OBJECT_WEIGHT * paintings.coverage(CELL).flatten(1)
    weight = (weight / weight.mean())[:, :, None]

    flow = Flow(
        build_clip(resume, tokenizers[0]),
        build_t5(resume, tokenizers[1]),
        build_transformer(resume),
        paintings.size // CELL,
    ).to(device)
    if resume and (resume / "flow.pt").exists():
        flow.load_state_dict(torch.load(resume / "flow.pt", map_location=device)["flow"])
    flow.train()
    average = Average(flow, AVERAGE_DECAY)
    muon, adamw = build_optimizers(flow)
    parameters = list(flow.parameters())
    compiled = torch.compile(flow, dynamic=False)
    torch.manual_seed(seed + rank)
    clock, step, progress, losses = Clock(minutes), 0, 0.0, []
    while progress < 1:
        length, count = SHORT, batch
        if step % LONG_EVERY == LONG_EVERY - 1:
            length = LONG[step // LONG_EVERY % len(LONG)]
            count = max(batch * SHORT // (2 * length), 1)
        index = torch.randint(0, paintings.count, (count,), device=device)
        clean, sigma = data[index].float(), draw_sigma(count, device)
        noise = torch.randn_like(clean)
        noised = torch.lerp(clean, noise, sigma[:, None, None])
        # one compiled shape: compiling for the rare lengths would take longer than they do
        predict = compiled if length == SHORT else flow
        with torch.autocast(device, torch.bfloat16), plain_attention():
            velocity = predict(noised, sigma, *captions.draw(index, length))
            loss = ((velocity.float() - (noise - clean)).pow(2) * weight[index]).mean()
        muon.zero_grad(set_to_none=True)
        adamw.zero_grad(set_to_none=True)
        loss.backward()
        progress, mean_loss = agree(parameters, clock.progress, loss.item())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        set_rate(muon, rate, step, progress)
        set_rate(adamw, rate * ADAMW_SHARE, step, progress)
        muon.step()
        adamw.step()
        average.update(flow)
        step += 1
        losses.append(mean_loss)
        if rank == 0 and step % 100 == 0:
            clock.log("flow", step, "mean loss", round(sum(losses[-100:]) / 100, 4))
        if rank == 0 and step % 500 == 0:
            save(flow, average, vae, tokenizers, out)
    if rank == 0:
        clock.log("flow", step, "steps")
        save(flow, average, vae, tokenizers, out)
