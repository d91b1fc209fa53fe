"""How the shipped small models are made: data, autoencoder, flow generator."""
