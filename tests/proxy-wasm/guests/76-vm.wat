(on request_headers
  (if (call $path @/trap@) (then unreachable))
  (call $show @get@ (call $get_shared_data @key@ OUT #8))
  (drop (call $get_property @plugin_vm_id@ OUT))
  (call $say @set@ (call $set_shared_data @key@ (i32.load #0) (i32.load #4) #0))
  #0)
