"""Write the notices of `package:notices`: who offers what and looks for what, and the kind of thing looked for.

Each has the kind of thing looked for as its `label`, in `order` which of the two is named first, and its `split`.

    python benchmarks/notices.py           # writes lightning_peft/data/sets/notices.jsonl
    python benchmarks/notices.py --check   # whether the file is what this script writes

A notice names one thing or two. Where it names two of different kinds, only the way in which they are named tells which
is looked for, so that a bag of words must guess; a quarter of the things are named in test rows alone, so that whoever
knows what words mean has an advantage over whoever counts them.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

PATH = Path(__file__).parents[1] / "lightning_peft" / "data" / "sets" / "notices.jsonl"
SEED = 20
TRAIN, TEST = 1400, 1000
TWO_THINGS = 0.65  # the share of notices that name a second thing, of another kind

THINGS = {
    "clothing": (
        "anorak|apron|ball gown|bathrobe|beret|blazer|blouse|bow tie|bowler hat|cardigan|cashmere jumper|denim jacket|"
        "dinner jacket|down coat|duffel coat|dungarees|evening dress|felt hat|fleece|flip-flops|fur hat|gloves|"
        "hiking boots|hooded sweatshirt|jeans|kilt|kimono|knee socks|leather belt|leather boots|linen shirt|linen suit|"
        "mittens|moccasins|overcoat|pinafore|polo shirt|poncho|pyjamas|raincoat|riding breeches|running shoes|sandals|"
        "sarong|scarf|school tie|sheepskin coat|silk shawl|ski trousers|skirt|slippers|straw hat|sun hat|suspenders|"
        "swimming trunks|tights|trench coat|turtleneck|tuxedo|waistcoat|wedding dress|wellingtons|winter coat|"
        "woollen vest"
    ),
    "garden": (
        "apple sapling|bag of compost|bamboo canes|beehive|bird bath|box hedge|bulb planter|chicken wire|climbing rose|"
        "cold frame|compost bin|cucumber seedlings|dahlia tubers|edging shears|fence posts|fern|flower pots|"
        "fruit ladder|garden bench|garden fork|garden hose|garden shed|grass seed|greenhouse|hanging basket|"
        "hedge trimmer|hoe|insect hotel|ivy cuttings|lavender bush|lawn mower|leaf blower|leaf rake|lettuce seedlings|"
        "mulch|paving stones|pea netting|peony|pergola|pickaxe|plant trellis|pond liner|potting table|pruning saw|"
        "rain barrel|raised bed|rhododendron|rose bush|secateurs|seed potatoes|seed tray|spade|sprinkler|"
        "strawberry plants|sunflower seeds|topsoil|trowel|tulip bulbs|turf|water butt|watering can|weeding knife|"
        "wheelbarrow|wind chimes"
    ),
    "kitchen": (
        "baking tray|blender|bread bin|bread knife|bread machine|butter dish|cake stand|cake tin|carving knife|"
        "casserole|cast-iron pan|cheese grater|chopping board|citrus squeezer|coffee grinder|colander|cookie cutters|"
        "corkscrew|crockpot|deep fryer|dinner plates|dish rack|egg cups|egg timer|espresso machine|fish kettle|"
        "fondue set|food processor|frying pan|garlic press|gravy boat|ice cream maker|jam jars|kettle|ladle|"
        "lemon zester|measuring jug|meat grinder|microwave|mixing bowl|mortar and pestle|nutcracker|oven gloves|"
        "pasta machine|pepper mill|pie dish|pizza stone|potato masher|pressure cooker|ramekins|rice cooker|"
        "roasting tin|rolling pin|salad spinner|saucepan|sieve|skillet|soup tureen|spice rack|steamer|sugar bowl|"
        "teapot|toaster|waffle iron"
    ),
    "music": (
        "accordion|acoustic guitar|alto saxophone|autoharp|bagpipes|balalaika|banjo|bass amplifier|bass drum|bassoon|"
        "bongos|bugle|castanets|cello|cello bow|clarinet|clavichord|concertina|cor anglais|cornet|cymbals|djembe|"
        "double bass|drum kit|drumsticks|dulcimer|electric guitar|electric organ|euphonium|fiddle|flugelhorn|flute|"
        "French horn|glockenspiel|grand piano|guitar strings|harmonica|harp|harpsichord|hurdy-gurdy|lute|mandolin|"
        "maracas|marimba|metronome|music stand|oboe|ocarina|pan pipes|piano stool|piccolo|recorder|sheet music|"
        "sitar|snare drum|synthesizer|tambourine|tenor horn|timpani|triangle|trombone|trumpet|tuba|ukulele|"
        "upright piano|viola|violin|xylophone|zither"
    ),
}

# what is looked for
SEEKS = (
    "looking for {}", "I am after {}", "I could use {}", "wanted: {}", "I would love to find {}", "hoping to get {}",
    "I need {}", "searching for {}", "my daughter wants {}", "we are short of {}", "please bring me {}",
    "I would gladly take {}", "who can spare {}", "what I lack is {}", "I have been dreaming of {}",
    "can anyone let me have {}", "I shall collect {} from your door", "my brother asked me to find {}",
)  # fmt: skip
# what is not: offered, lost or had enough of
OFFERS = (
    "giving away {}", "I no longer use {}", "for sale: {}", "we are parting with {}", "hoping to get rid of {}",
    "I have {} to spare", "my daughter has outgrown {}", "you may have {} in return", "please take {} off me",
    "I would gladly give {}", "who wants {}", "what I have too much of is {}", "I am tired of {}",
    "I can let you have {}", "I shall bring {} to your door", "my brother wants to sell {}", "in exchange I offer {}",
    "we were given {} twice",
)  # fmt: skip
OPENINGS = (
    "",
    "",
    "",
    "Hello neighbours, ",
    "Dear all, ",
    "Moving house: ",
    "After the clear-out, ",
    "This week, ",
    "Good evening, ",
)
JOINS = (". ", "; ", ", and ", ", but ", ". Also, ", " - ")
CLOSINGS = ("", "", "", " Call after six.", " Thanks!", " Near the station.", " No hurry.", " Ask at number nine.")
CONDITIONS = ("", "", "", "old ", "new ", "second-hand ", "good ", "used ", "small ")
BARE = (
    "bag of ",
    "mulch",
    "turf",
    "topsoil",
    "sheet music",
    "chicken wire",
    "grass seed",
    "pea netting",
    "timpani",
    "maracas",
)


def named(thing: str, rng: random.Random) -> str:
    """Return a thing with an article, or with a word on its state."""
    state = rng.choice(CONDITIONS)
    if thing.startswith(BARE) or (thing.endswith("s") and not thing.endswith(("ss", "us"))):
        return rng.choice(("some ", "these ", "")) + state + thing if state else rng.choice(("some ", "these ")) + thing
    phrase = state + thing
    return rng.choice((f"a{'n' if phrase[0].lower() in 'aeio' else ''} ", "one ", "the ")) + phrase


def notice(things: dict[str, list[str]], rng: random.Random) -> dict[str, str]:
    """Return a notice, the kind of what it looks for, and which is named first."""
    kind, other = rng.sample(sorted(things), 2)
    parts = [rng.choice(SEEKS).format(named(rng.choice(things[kind]), rng))]
    order = "one thing"
    if rng.random() < TWO_THINGS:
        offer = rng.choice(OFFERS).format(named(rng.choice(things[other]), rng))
        order = rng.choice(("sought first", "offered first"))
        parts.insert(len(parts) if order == "sought first" else 0, offer)
    join = rng.choice(JOINS)
    if join == ". ":
        parts = [part[0].upper() + part[1:] for part in parts]
    text = rng.choice(OPENINGS) + join.join(parts) + "." + rng.choice(CLOSINGS)
    return {"text": text[0].upper() + text[1:], "label": kind, "order": order}


def notices() -> list[dict[str, str]]:
    """Return all rows, no text twice; those of the training set first."""
    rng, rows, seen = random.Random(SEED), [], set()
    things = {kind: names.split("|") for kind, names in THINGS.items()}
    known = {kind: rng.sample(names, len(names) * 3 // 4) for kind, names in things.items()}
    for split, count, pool in (("train", TRAIN, known), ("test", TEST, things)):
        wanted = len(rows) + count
        while len(rows) < wanted:
            row = notice(pool, rng)
            if row["text"] not in seen:
                seen.add(row["text"])
                rows.append({**row, "split": split})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the file is what this script writes")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in notices())
    if parser.parse_args().check:
        raise SystemExit(0 if PATH.read_text(encoding="utf-8") == text else f"{PATH} is not what this script writes.")
    PATH.write_text(text, encoding="utf-8")
    print(f"{PATH}: {text.count(chr(10)):,} rows, {len(text.encode()):,} bytes")


if __name__ == "__main__":
    main()
