"""First contact: is this machine fit for the run (node_check.py), and does this installation compute right on this cluster (acceptance.py)?"""
