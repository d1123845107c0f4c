from collections import Counter
def table(entries):
    c=Counter((e["file"],e["type"],e["outcome"]) for e in entries)
    return "\n".join(f"{k}: {v}" for k,v in sorted(c.items(), key=str))
