"""The ground floor: block geometry, target layers, packing, reports. Imports torch and safetensors only."""
