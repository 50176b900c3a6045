"""From conversations to token ids with a loss mask.

Read in this order: `conversations` (rows in), `regenerate` (the target's own answers), `chat_template` (ids + mask),
`tokens` (the store), `build` (the stage that joins them).
"""
