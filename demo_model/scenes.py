"""Landscape scenes as integer attributes, and the captions that describe them."""

import random

import torch

TIMES = ["dawn", "noon", "sunset", "night"]
CELESTIAL = ["none", "sun", "full moon", "crescent moon"]
LAND = ["green hills", "snowy mountains", "desert dunes", "a lake"]
HOUSE = ["none", "red", "blue", "yellow", "white", "purple"]
SIDE = ["on the left", "in the middle", "on the right"]
TREES = ["none", "pine", "oak"]
COUNT = ["one", "two", "three"]
BALLOON = ["none", "red", "blue", "yellow", "green", "orange"]
CLOUDS = ["clear", "cloudy"]
BOAT = ["none", "white", "red"]

ATTRIBUTES = {
    "time": TIMES,
    "celestial": CELESTIAL,
    "land": LAND,
    "house": HOUSE,
    "side": SIDE,
    "trees": TREES,
    "count": COUNT,
    "balloon": BALLOON,
    "clouds": CLOUDS,
    "boat": BOAT,
}
"""Every attribute of a scene with the names of its values, in index order."""

OBJECTS = ("celestial", "house", "trees", "balloon", "boat")
"""Attributes that put an object into the picture, where value 0 means 'none'."""

LEADS = ["", "", "a painting of ", "a landscape with ", "a flat illustration of "]

Scenes = dict[str, torch.Tensor]
"""A batch of scenes: attribute name -> integer tensor of shape [batch]."""


def sample_scenes(batch: int, generator: torch.Generator) -> Scenes:
    """Draw `batch` scenes on the CPU; combinations that make no sense (a sun at night) never occur."""

    def integers(high: int) -> torch.Tensor:
        return torch.randint(0, high, (batch,), generator=generator)

    def flip(probability: float) -> torch.Tensor:
        return torch.rand(batch, generator=generator) < probability

    scenes = {name: integers(len(values)) for name, values in ATTRIBUTES.items()}
    moon = torch.where(flip(0.5), CELESTIAL.index("full moon"), CELESTIAL.index("crescent moon"))
    body = torch.where(scenes["time"] == TIMES.index("night"), moon, CELESTIAL.index("sun"))
    scenes["celestial"] = torch.where(flip(0.2), 0, body)
    scenes["house"] = torch.where(flip(0.2), 0, integers(len(HOUSE) - 1) + 1)
    scenes["balloon"] = torch.where(flip(0.45), 0, integers(len(BALLOON) - 1) + 1)
    on_lake = scenes["land"] == LAND.index("a lake")
    scenes["boat"] = torch.where(on_lake & flip(0.6), integers(len(BOAT) - 1) + 1, 0)
    return scenes


def visible(scenes: Scenes) -> dict[str, torch.Tensor]:
    """Tell per attribute, as booleans [batch], whether it can be seen: a side needs a house, a count needs trees."""
    shown = {name: torch.ones_like(values, dtype=torch.bool) for name, values in scenes.items()}
    return {**shown, "side": scenes["house"] > 0, "count": scenes["trees"] > 0}


def rows(scenes: Scenes) -> list[dict[str, int]]:
    """Split a batch of scenes into one dict of plain integers per scene."""
    columns = {name: values.tolist() for name, values in scenes.items()}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def caption(scene: dict[str, int], rng: random.Random, complete: bool = False) -> str:
    """Describe one scene; phrases are left out at random, unless `complete`, so omission means 'anything goes'."""

    def keep(probability: float = 0.9) -> bool:
        return complete or rng.random() < probability

    parts = []
    if keep():
        if scene["house"]:
            where = f" {SIDE[scene['side']]}" if keep(0.8) else ""
            parts.append(f"a {HOUSE[scene['house']]} house{where}")
        elif keep(0.6):
            parts.append("no house")
    if keep():
        if scene["trees"]:
            plural = "s" if scene["count"] else ""
            parts.append(f"{COUNT[scene['count']]} {TREES[scene['trees']]} tree{plural}")
        elif keep(0.6):
            parts.append("no trees")
    if keep():
        if scene["balloon"]:
            article = "an" if BALLOON[scene["balloon"]] == "orange" else "a"
            parts.append(f"{article} {BALLOON[scene['balloon']]} hot air balloon")
        elif keep(0.4):
            parts.append("no balloon")
    if scene["boat"] and keep():
        parts.append(f"a sailboat with a {BOAT[scene['boat']]} sail")
    if scene["celestial"] and keep():
        article = "the" if CELESTIAL[scene["celestial"]] == "sun" else "a"
        parts.append(f"{article} {CELESTIAL[scene['celestial']]}")
    if keep():
        parts.append(f"a {CLOUDS[scene['clouds']]} sky")
    rng.shuffle(parts)
    text = ", ".join(([LAND[scene["land"]]] if keep(0.95) else []) + parts)
    lead = rng.choice(LEADS)
    if keep(0.95):
        when = f"at {TIMES[scene['time']]}"
        text = f"{when}, {text}" if not lead and rng.random() < 0.7 else f"{text or 'a landscape'} {when}"
    return (lead + text).strip(" ,") or "a landscape"
