"""A trained head on its way to others: the folder that is published, the hub, and checking a card's figures again.

`folder` makes the folder, `card` its model card with its figures; `record` knows what a run recorded; `scrub` keeps
keys and local paths out; `gate` says whether the head may go; `hub` sends and fetches; `reproduce` runs a card's
evaluation again.
"""
