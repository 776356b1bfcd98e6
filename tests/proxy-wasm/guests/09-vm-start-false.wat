(on vm_start #0)
