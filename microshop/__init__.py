"""microshop"""
