"""What a pipeline draws without a generator follows the seed, and leaves the process's own as they are."""

import pytest
import torch

from quant_core import generate
from quant_core.seeding import seeded

from .small_requests import load, small


@pytest.mark.parametrize("own_seed", [None, 0], ids=["draws", "sets a seed of its own"])
def test_random_numbers_without_a_generator_follow_the_seed(tiny, own_seed):
    pipeline = load(tiny, "sd")

    def noise(module, args, output):
        if own_seed is not None:
            torch.manual_seed(own_seed)
        return output + torch.randn_like(output)

    plain = generate(pipeline, small("sd"))
    pipeline.pipe.vae.decoder.register_forward_hook(noise)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, other, again = (generate(pipeline, small("sd", seed=seed)) for seed in (0, 1, 0))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again) and not torch.equal(first, plain) and not torch.equal(first, other)


def test_a_run_that_is_stopped_leaves_them_too(tiny):
    pipeline = load(tiny, "sd")

    def stop(step):
        torch.manual_seed(1)
        raise KeyboardInterrupt

    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        generate(pipeline, small("sd"), stop)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [0, 5, 2**64 - 1])
def test_they_are_not_the_noise_that_the_run_starts_from(seed):
    with seeded(seed, torch.device("cpu")):
        drawn = torch.randn(100)
    assert not torch.isin(drawn, torch.randn(100, generator=torch.Generator().manual_seed(seed))).any()
