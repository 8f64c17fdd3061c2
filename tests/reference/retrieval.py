"""Retrieval by sorting the whole matrix, wrong answers placed before right ones that tie."""


def places(scores, right):
    """1-based places of the right ones among all candidates of one query."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j in right))
    return [place for place, j in enumerate(order, 1) if j in right]


def average_precision(found, top=10):
    """Precision at each right one in the top, over how many could stand there."""
    return sum(k / p for k, p in enumerate(found, 1) if p <= top) / min(len(found), top)


def answers(similarity, pairs):
    """(query, 0-based rank, average precision, number right) of every query, both directions."""
    both = []
    for scores, ours in (similarity, pairs), (zip(*similarity), [(t, i) for i, t in pairs]):
        rows = []
        for query, row in enumerate(scores):
            right = {other for mine, other in ours if mine == query}
            if right:
                found = places(row, right)
                rows.append((query, found[0] - 1, average_precision(found), len(right)))
        both.append(rows)
    return both
