from PIL import Image

MAX_PREVIEW_RESOLUTION = 512
drawn = []  # (latent format, latents)


class Previewer:
    def __init__(self, latent_format):
        self.latent_format = latent_format

    def decode_latent_to_preview_image(self, preview_format, x0):
        drawn.append((type(self.latent_format).__name__, x0))
        return preview_format, Image.new("RGB", (x0.shape[-1], x0.shape[-2])), MAX_PREVIEW_RESOLUTION


def get_previewer(device, latent_format):
    return Previewer(latent_format)
