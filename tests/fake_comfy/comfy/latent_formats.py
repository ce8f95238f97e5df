class SD15:
    latent_channels = 4
    latent_dimensions = 2


class Flux:
    latent_channels = 16
    latent_dimensions = 2


class Wan21:
    latent_channels = 16
    latent_dimensions = 3
