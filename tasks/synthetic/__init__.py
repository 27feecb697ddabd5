"""Synthetic text with exact laws: what every sampler can be measured against without training anything.

`law` says what a law must offer (draws, exact NLL and entropy, the cavity distribution behind every posterior),
`chain` has the product law, the Markov chain and the hidden Markov model by forward-backward, `grammar` a probabilistic
grammar by the inside algorithm, `recipe` makes their parameters, `oracle` puts a law in the place of a network, and
`task` registers them as `product`, `markov`, `hmm` and `grammar`.
"""
