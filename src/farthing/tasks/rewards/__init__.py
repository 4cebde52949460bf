"""Verifiers by name, one module each: `verify(item, text, convention, settings) -> Verdict`.

They run in the processes of the pool, which have limits of time and memory; `judge`, `reward_model`, `length` and
`overlong` need more than one answer's text and are added afterwards (`total.added`).
"""
