"""PEFT methods that huggingface/peft lacks, one package each. A new one is listed here."""

METHODS = (  # each registers itself with peft when it is imported
    "lightning_peft.tuners.head_offsets",
    "lightning_peft.tuners.layer_offsets",
    "lightning_peft.tuners.weight_deltas",
    "lightning_peft.tuners.bottleneck",
    "lightning_peft.tuners.prefix",
    "lightning_peft.tuners.ssb",
)
