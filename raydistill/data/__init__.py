"""From files to plans: rows -> split -> encode -> structural filter -> examples -> what each step samples or scores."""
