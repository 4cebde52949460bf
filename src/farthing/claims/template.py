"""A claim to fill in, as `farthing claim --new` prints it."""

TEMPLATE = """\
# A claim about what a model cost. Fill in what was said, delete the rest, then: farthing claim FILE.yaml
# Every key is described in docs/claims.md. Give reported figures only; Farthing does the arithmetic.
name: my-claim
title: Example-7B, trained for $100,000
about: >-
  Example Labs says that training its model of 7B parameters on 1T tokens took 50,000 H100 hours, $100,000 of rent.
reported:
  device: h100
  device_hours: 50000           # or devices with hours or days
  dollars: 100000               # all amounts in US dollars
  # price_per_device_hour: 2.00       the rent that the claim names
  # our_price_per_device_hour: 2.00   a rent that you assume, where it names none; it is marked and not judged
  tokens: 1.0e12
  # tokens_are: at most               where only a bound is known
  # seq_len: 4096                     needed with an architecture
  # energy_mwh: 35
  # tonnes_co2e: 14
params: 7.0e9                   # active ones; or `architecture:` with the model's config.json
excluded:                       # what the price leaves out
  - what: earlier research and failed runs
    multiple: [0.5, 4.62]       # of the claimed dollars; or amount: [low, high]; or neither, where nobody has said
    source: OLMo (arXiv:2503.05804) and Olmo 3 (arXiv:2605.01158), two other laboratories' ledgers
    date: "2026-05"
    evidence: secondary         # read, secondary or recalled
  - what: staff
sources:                        # each figure above needs one
  - of: [device, device_hours, dollars, tokens, params]
    text: where it was said
    date: "2026-11"
    evidence: read
"""
