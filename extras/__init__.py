"""What a user of genie_mini may want and a reader of genie_mini.py need not know."""
