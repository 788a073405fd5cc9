"""Names of latents and clusters from their tokens."""

from dist_sae.analysis.names import distinct


def test_a_repeat_leaves_the_first_text_in_its_place() -> None:
    assert distinct([" a", "b", "A"]) == ["a", "b"]
    assert distinct(["The", " the", "of", "THE", "of"]) == ["The", "of"]
    assert distinct(["  ", "\n"]) == ["'  '", "'\\n'"]
