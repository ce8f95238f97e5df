"""Paint scenes as flat landscape illustrations, vectorised over the batch; the training data of the demo model."""

import torch

from .canvas import Canvas, least, most
from .scenes import LAND, OBJECTS, TIMES, Scenes

JITTERS = 48
"""How many uniform random numbers in [0, 1) one scene's layout takes."""

SKY_TOP = [(0.45, 0.55, 0.82), (0.25, 0.55, 0.92), (0.32, 0.20, 0.48), (0.03, 0.05, 0.18)]
SKY_LOW = [(0.98, 0.78, 0.72), (0.78, 0.90, 0.99), (0.99, 0.55, 0.25), (0.14, 0.18, 0.40)]
LAND_FAR = [(0.38, 0.66, 0.38), (0.52, 0.58, 0.68), (0.90, 0.72, 0.45), (0.40, 0.60, 0.45)]
LAND_NEAR = [(0.25, 0.55, 0.24), (0.78, 0.86, 0.96), (0.82, 0.60, 0.32), (0.30, 0.56, 0.30)]
NO_COLOUR = (0, 0, 0)
WALL = [NO_COLOUR, (0.80, 0.14, 0.12), (0.14, 0.32, 0.82), (0.97, 0.82, 0.18), (0.97, 0.96, 0.94), (0.55, 0.20, 0.70)]
CLOTH = [NO_COLOUR, (0.86, 0.13, 0.13), (0.13, 0.33, 0.90), (0.98, 0.86, 0.16), (0.14, 0.66, 0.28), (0.98, 0.50, 0.08)]
SAIL = [NO_COLOUR, (0.97, 0.96, 0.94), (0.86, 0.14, 0.14)]
HOUSE_X = (0.24, 0.5, 0.76)
TREE_X = ((0.54, 0.72, 0.90), (0.10, 0.90, 0.245), (0.10, 0.28, 0.46))
"""Where trees stand for each side of the house, so that the house hides none of them."""
CLOUD_PUFFS = ((-0.07, 0, 0.035), (0, -0.018, 0.05), (0.07, 0, 0.038), (0.03, 0.008, 0.04), (-0.035, 0.008, 0.04))
PINE_TIERS = ((0.245, 0.040, 0.09), (0.19, 0.053, 0.095), (0.13, 0.066, 0.09))
OAK_PUFFS = ((-0.036, -0.095, 0.042), (0.036, -0.095, 0.042), (0.0, -0.13, 0.049))


def draw_jitter(batch: int, generator: torch.Generator) -> torch.Tensor:
    """Draw the layout's random numbers, [batch, JITTERS] in [0, 1)."""
    return torch.rand(batch, JITTERS, generator=generator)


def paint_sky(c: Canvas) -> torch.Tensor:
    """Paint sky, stars, clouds and sun or moon; returns where the latter is (or would be), x as [batch, 1, 1]."""
    x, y, scenes = c.x, c.y, c.scenes
    time, body = scenes["time"], scenes["celestial"]
    low_sky = c.palette(SKY_LOW, time)
    height = torch.clamp(y / 0.62, 0, 1)[:, None]
    c.image = c.image + c.palette(SKY_TOP, time) * (1 - height) + low_sky * height

    cell_x, cell_y = torch.floor(x * 14), torch.floor(y * 14)
    noise = torch.frac(torch.sin(cell_x * 12.9898 + cell_y * 78.233 + c.uniform(0, 100)) * 43758.5453).abs()
    star_x = cell_x + 0.25 + 0.5 * torch.frac(noise * 91.7)
    star = torch.sqrt((x * 14 - star_x) ** 2 + (y * 14 - cell_y - 0.5) ** 2) / 14
    starry = (time == TIMES.index("night")) & (scenes["clouds"] == 0)
    c.blend(c.colour(1.0, 1.0, 0.9), c.cover(star - 0.006) * (noise > 0.84).float() * 0.9, starry)

    low_sun = ((time == TIMES.index("dawn")) | (time == TIMES.index("sunset")))[:, None, None]
    body_x, radius = c.uniform(0.15, 0.85), c.uniform(0.072, 0.09)
    body_y = torch.where(low_sun, c.uniform(0.26, 0.34), c.uniform(0.14, 0.24))
    distance = torch.sqrt((x - body_x) ** 2 + (y - body_y) ** 2)
    sun_rgb = torch.where(low_sun[:, None], c.colour(1.0, 0.84, 0.45), c.colour(1.0, 0.93, 0.45))
    cloud_rgb = 0.25 * low_sky + 0.75 * c.light * c.colour(0.97, 0.97, 1.0)
    c.blend(sun_rgb, torch.exp(-((distance / 0.16) ** 2)) * 0.45, body == 1)
    for low, high in ((0.22, 0.36), (0.43, 0.57), (0.64, 0.78)):
        cloud_x = torch.frac(body_x + c.uniform(low, high))
        cloud_y, scale = c.uniform(0.08, 0.32), c.uniform(0.9, 1.25)
        puffs = [
            torch.sqrt((x - cloud_x - dx * scale) ** 2 + ((y - cloud_y - dy * scale) * 1.25) ** 2) - r * scale
            for dx, dy, r in CLOUD_PUFFS
        ]
        c.blend(cloud_rgb, c.cover(least(*puffs)) * 0.92, scenes["clouds"] == 1)
    moon_rgb = c.colour(0.97, 0.96, 0.86)
    bite = torch.sqrt((x - body_x - 0.45 * radius) ** 2 + (y - body_y + 0.2 * radius) ** 2)
    c.fill(sun_rgb, distance - radius, body == 1)
    c.fill(moon_rgb, distance - radius, body == 2)
    c.fill(moon_rgb, most(distance - radius, 0.85 * radius - bite), body == 3)
    return body_x


def paint_land(c: Canvas) -> None:
    """Paint the far ridge, the near ground and, where the land is a lake, the water in front."""
    x, y, scenes = c.x, c.y, c.scenes
    land, time = scenes["land"], scenes["time"]
    is_land = {name: (land == LAND.index(name))[:, None, None] for name in LAND}
    phase, phase2, wave, wave2 = c.uniform(0, 6.28), c.uniform(0, 6.28), c.uniform(5, 8), c.uniform(11, 15)
    hills = 0.56 + 0.035 * torch.sin(wave * x + phase) + 0.015 * torch.sin(wave2 * x + phase2)
    saw1 = 2 * torch.abs(torch.frac(x * c.uniform(1.6, 2.2) + c.uniform(0, 1)) - 0.5)
    saw2 = 2 * torch.abs(torch.frac(x * c.uniform(2.4, 3.2) + c.uniform(0, 1)) - 0.5)
    peaks = 0.36 + 0.26 * torch.minimum(saw1, saw2 + 0.25)
    dunes = 0.55 + 0.05 * torch.abs(torch.sin(0.5 * wave * x + phase))
    ridge = torch.where(is_land["snowy mountains"], peaks, torch.where(is_land["desert dunes"], dunes, hills))
    c.fill(c.palette(LAND_FAR, land) * (0.35 + 0.65 * c.light), ridge - y)
    snow = most(ridge - y, y - (ridge + 0.055 + 0.012 * torch.sin(60 * x + phase2)))
    c.fill(c.colour(0.97, 0.98, 1.0) * c.light, snow, land == LAND.index("snowy mountains"))
    shade = 1 - 0.22 * torch.clamp((y - 0.67) / 0.33, 0, 1)[:, None]
    c.fill(c.palette(LAND_NEAR, land) * c.light * shade, 0.67 + 0.022 * torch.sin(0.6 * wave2 * x + phase) - y)
    water = 0.55 * c.palette(SKY_LOW, time) + 0.25 * c.palette(SKY_TOP, time) + c.colour(0.02, 0.07, 0.12) * c.light
    ripple = 0.04 * torch.sin(y * 120 + 3 * torch.sin(x * 14 + phase))[:, None]
    shore = 0.825 + 0.008 * torch.sin(9 * x + phase2)
    c.fill(water + ripple, shore - y, land == LAND.index("a lake"))


def paint_house(c: Canvas) -> torch.Tensor:
    """Paint the house; returns where it stands (or would stand), x as [batch, 1, 1]."""
    x, y, present = c.x, c.y, c.scenes["house"] > 0
    house_x = torch.tensor(HOUSE_X, device=x.device)[c.scenes["side"]][:, None, None] + c.uniform(-0.025, 0.025)
    base, half, height, roof_height = 0.79, c.uniform(0.108, 0.126), c.uniform(0.145, 0.17), 0.10
    top = base - height
    glow = 0.3 + 0.7 * c.light
    wall_rgb = c.palette(WALL, c.scenes["house"]) * glow
    walls = most(torch.abs(x - house_x) - half, torch.abs(y - (base - height / 2)) - height / 2)
    c.fill(wall_rgb, walls, present)
    c.fill(wall_rgb * 0.82, most(walls, 0.4 * half - (x - house_x)), present)
    slope = torch.clamp((y - (top - roof_height)) / roof_height, 0, 1)
    roof = most(torch.abs(x - house_x) - 1.2 * half * slope, top - roof_height - y, y - top)
    c.fill(c.colour(0.36, 0.22, 0.18) * glow, roof, present)
    door = most(torch.abs(x - house_x + 0.42 * half) - 0.2 * half, torch.abs(y - (base - 0.3 * height)) - 0.3 * height)
    c.fill(c.colour(0.30, 0.18, 0.12) * glow, door, present)
    sill = torch.abs(y - (base - 0.55 * height)) - 0.2 * height
    pane = most(torch.abs(x - house_x - 0.4 * half) - 0.24 * half, sill)
    lamp_lit = (c.scenes["time"] == TIMES.index("night")) | (c.scenes["time"] == TIMES.index("sunset"))
    glass = torch.where(lamp_lit[:, None, None, None], c.colour(1.0, 0.85, 0.40), c.colour(0.72, 0.86, 0.96))
    c.fill(glass, pane, present)
    return house_x


def paint_trees(c: Canvas) -> None:
    """Paint one to three pines or oaks in the places that the house leaves free."""
    x, y, scenes = c.x, c.y, c.scenes
    slots = torch.tensor(TREE_X, device=x.device)[scenes["side"]]
    base, glow = 0.80, 0.2 + 0.8 * c.light
    for k in range(slots.shape[1]):
        tree_x, scale = slots[:, k, None, None] + c.uniform(-0.02, 0.02), c.uniform(0.95, 1.15)
        stands = (scenes["trees"] > 0) & (scenes["count"] >= k)
        trunk = most(torch.abs(x - tree_x) - 0.011 * scale, torch.abs(y - (base - 0.03 * scale)) - 0.03 * scale)
        c.fill(c.colour(0.38, 0.25, 0.15) * glow, trunk, stands)
        tiers = []
        for rise, half, length in PINE_TIERS:
            tip = base - rise * scale
            slope = torch.clamp((y - tip) / (length * scale), 0, 1)
            tiers.append(most(torch.abs(x - tree_x) - half * scale * slope, tip - y, y - tip - length * scale))
        c.fill(c.colour(0.06, 0.34, 0.24) * glow, least(*tiers), stands & (scenes["trees"] == 1))
        puffs = [
            torch.sqrt((x - tree_x - dx * scale) ** 2 + (y - base - dy * scale) ** 2) - r * scale
            for dx, dy, r in OAK_PUFFS
        ]
        c.fill(c.colour(0.60, 0.72, 0.14) * glow, least(*puffs), stands & (scenes["trees"] == 2))


def paint_balloon(c: Canvas, body_x: torch.Tensor) -> None:
    """Paint the hot air balloon, to the side of the sun or moon."""
    x, y, present = c.x, c.y, c.scenes["balloon"] > 0
    balloon_x = c.away_from(body_x, 0.15, 0.85, 0.35)
    balloon_y, radius = c.uniform(0.16, 0.27), c.uniform(0.088, 0.108)
    cloth = c.palette(CLOTH, c.scenes["balloon"]) * (0.3 + 0.7 * c.light)
    ball = torch.sqrt((x - balloon_x) ** 2 + ((y - balloon_y) * 0.92) ** 2) - radius
    taper = torch.clamp(1 - (y - balloon_y - 0.5 * radius) / (1.15 * radius), 0, 1)
    neck_top, neck_end = balloon_y + 0.5 * radius, balloon_y + 1.5 * radius
    envelope = least(ball, most(torch.abs(x - balloon_x) - 0.86 * radius * taper, neck_top - y, y - neck_end))
    c.fill(cloth, envelope, present)
    c.fill(0.45 * cloth + 0.55 * c.light, most(envelope, torch.abs(x - balloon_x) - 0.2 * radius), present)
    basket = most(torch.abs(x - balloon_x) - 0.26 * radius, torch.abs(y - (balloon_y + 1.85 * radius)) - 0.2 * radius)
    c.fill(c.colour(0.45, 0.28, 0.14) * c.light, basket, present)


def paint_boat(c: Canvas, house_x: torch.Tensor) -> None:
    """Paint the sailboat on the lake, to the side of the house."""
    x, y, present = c.x, c.y, c.scenes["boat"] > 0
    boat_x = c.away_from(house_x, 0.14, 0.86, 0.3)
    deck, mast = 0.905, 0.20
    hull = most(torch.abs(x - boat_x) - (0.115 - 0.9 * torch.clamp(y - deck, 0, 1)), torch.abs(y - deck - 0.02) - 0.02)
    c.fill(c.colour(0.35, 0.20, 0.12) * c.light, hull, present)
    widening = torch.clamp((y - (deck - mast)) / mast, 0, 1)
    sail = most(x - boat_x + 0.02 - 0.11 * widening, boat_x - 0.02 - x, deck - mast - y, y - deck + 0.014)
    c.fill(c.palette(SAIL, c.scenes["boat"]) * (0.3 + 0.7 * c.light), sail, present)


def paint(scenes: Scenes, jitter: torch.Tensor, size: int) -> torch.Tensor:
    """Paint scenes with the layout that `jitter` gives, as images [batch, 3, size, size] in [-1, 1]."""
    canvas = Canvas(scenes, jitter, size)
    body_x = paint_sky(canvas)
    paint_land(canvas)
    house_x = paint_house(canvas)
    paint_trees(canvas)
    paint_balloon(canvas, body_x)
    paint_boat(canvas, house_x)
    return canvas.image.clamp(0, 1) * 2 - 1


def object_coverage(scenes: Scenes, jitter: torch.Tensor, size: int, cell: int) -> torch.Tensor:
    """Tell how much of each cell of `cell` pixels objects cover, [batch, size // cell, size // cell] in [0, 1].

    The same layout painted without its objects shows which pixels they change.
    """
    bare = {**scenes, **{name: torch.zeros_like(scenes[name]) for name in OBJECTS}}
    changed = (paint(scenes, jitter, size) - paint(bare, jitter, size)).abs().amax(1, keepdim=True) > 0.1
    return torch.nn.functional.avg_pool2d(changed.float(), cell)[:, 0]
