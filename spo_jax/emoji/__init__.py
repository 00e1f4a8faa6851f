"""A small closed world of captioned pictures (emoji on coloured backgrounds) to train and tune a tiny pipeline on."""
