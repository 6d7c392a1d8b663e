"""Networks for several tasks: plain ``nn.Module`` classes that map inputs to a dict of predictions."""
