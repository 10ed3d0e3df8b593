"""Plans and verifications as one self-contained HTML page each: no network, no build step.

``page`` fills templates; ``plan_page`` and ``verify_page`` turn values into rows; ``chart`` places
points. Everything from a checkpoint is text: templates escape it, and the page's security policy
runs no script but its own.
"""
