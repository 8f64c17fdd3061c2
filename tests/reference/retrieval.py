"""Recall by sorting every query's candidates, ties placed before the right answer."""


def image_to_text(similarity: list[list[float]], owner: list[int], k: int) -> float:
    hits = 0
    for i, row in enumerate(similarity):
        best = max(s for s, o in zip(row, owner) if o == i)
        ahead = sum(1 for s, o in zip(row, owner) if o != i and s >= best)
        hits += ahead < k
    return hits / len(similarity)


def text_to_image(similarity: list[list[float]], owner: list[int], k: int) -> float:
    hits = 0
    for j, o in enumerate(owner):
        own = similarity[o][j]
        ahead = sum(1 for i in range(len(similarity)) if i != o and similarity[i][j] >= own)
        hits += ahead < k
    return hits / len(owner)
