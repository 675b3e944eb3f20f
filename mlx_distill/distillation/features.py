"""Which layers of a student are compared with which of a teacher."""


def uniform_map(num_student: int, num_teacher: int) -> list[tuple[int, int]]:
    """Return pairs (student layer, teacher layer), evenly spread; the last ones are a pair."""
    share = num_teacher / num_student
    return [(layer, max(0, round((layer + 1) * share) - 1)) for layer in range(num_student)]
