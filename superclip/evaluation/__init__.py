"""What a model can do, as numbers that keep what each picture adds to them."""
