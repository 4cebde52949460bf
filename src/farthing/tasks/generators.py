"""Which of our scorers judges each reasoning-gym generator, or why none does (reasoning-gym 0.1.25).

reasoning-gym's own `score_answer` is never called. Those of countdown, puzzle24, polynomial_multiplication
and the two integrations hand the model's text to sympy's parser, which runs it; bitwise_arithmetic,
spiral_matrix, n_queens, binary_matrix, string_insertion and codeio call eval or exec; many others pay partial
credit by length.
"""

from __future__ import annotations

import difflib
from typing import Literal

from farthing.errors import UserError

# "mixed": a whole number for some questions and a word for others; each item says which.
Scorer = Literal["integer", "text", "expression", "mixed"]

_INTEGER = """
    aiw basic_arithmetic binary_alternation chain_sum circuit_logic count_bits count_primes gcd gsm_symbolic
    largest_island lcm leg_counting letter_counting maze number_sequence products rectangle_count
    rotten_oranges self_reference simple_equations simple_geometry
"""
_TEXT = """
    base_conversion bf bitwise_arithmetic color_cube_rotation course_schedule family_relationships
    figlet_font game_of_life_halting mahjong_puzzle needle_haystack path_star spell_backward spiral_matrix
    string_insertion string_manipulation string_splitting string_synthesis syllogism zebra_puzzles
"""
SCORERS: dict[str, Scorer] = {
    **dict.fromkeys(_INTEGER.split(), "integer"),
    **dict.fromkeys(_TEXT.split(), "text"),
    **dict.fromkeys(("countdown", "puzzle24"), "expression"),
    "calendar_arithmetic": "mixed",
}

_REASONS = {
    "its answers are decimals or fractions whose right spelling the question leaves open": """
        advanced_geometry coin_flip complex_arithmetic decimal_arithmetic decimal_chain_sum dice
        fraction_simplification number_format polynomial_equations power_function""",
    "its answers are formulas, and comparing formulas needs an algebra system that runs what it reads": """
        intermediate_integration polynomial_multiplication simple_integration""",
    "its answers are grids of several lines": """
        arc_1d arc_agi binary_matrix futoshiki game_of_life kakurasu manipulate_matrix mini_sudoku modulo_grid
        pool_matrix rearc rotate_matrix sudoku survo""",
    "its answers are lists or tables whose spelling the question leaves open": """
        codeio cryptarithm group_anagrams list_functions number_filtering number_sorting
        palindrome_partitioning prime_factorization word_sequence_reversal word_sorting""",
    "its answers are free sentences": """
        caesar_cipher emoji_mystery knights_knaves letter_jumble sentence_reordering""",
    "its answers are times, which the reading of a last clause would cut at the colon": "time_intervals",
    "its questions have more than one right answer and only one is given": """
        jugs knight_swap n_queens palindrome_generation quantum_lock shortest_path sokoban tower_of_hanoi
        tsumego word_ladder""",
    "its answers can be empty": "ab",
    "it gives no answer to compare with": "boxnet graph_color propositional_logic rubiks_cube rush_hour",
    "its items depend on how many are drawn, so that a seed and an index do not name one": "acre",
    "its items change with PYTHONHASHSEED, so that a seed and an index do not name one": """
        isomorphic_strings ransom_note""",
    "it mixes other generators, which a recipe's `tasks` does": "composite",
}
REFUSED: dict[str, str] = {name: why for why, names in _REASONS.items() for name in names.split()}


def scorer_of(name: str) -> Scorer:
    """The scorer of a generator. Raises UserError when it does not exist or is refused, and says why."""
    if name in SCORERS:
        return SCORERS[name]
    if name in REFUSED:
        raise UserError(f"tasks: {name} cannot be used because {REFUSED[name]}; choose another task")
    near = difflib.get_close_matches(name, [*SCORERS, *REFUSED], n=3, cutoff=0.5)
    hint = f"the nearest are {', '.join(near)}" if near else f"try {', '.join(list(SCORERS)[:5])}"
    raise UserError(f"tasks: there is no reasoning-gym generator {name!r}; {hint}")
