"""Verification of the promises P1 to P6 on the user's model, data and machine.

Each check compares what Tunesmith does with an oracle that is written without it: plain
`apply_chat_template`, plain transformers and peft, rows counted by hand.
"""
