(global $count (mut i32) #0)
(global $parent (mut i32) #0)
(on configure
  (call $show @configured@ (call $get_buffer_bytes #7 #0 #100 OUT))
  #1)
(on context_create (global.set $parent (local.get $parent)))
(on request_headers
  (global.set $count (i32.add (global.get $count) #1))
  (call $num @count@ (global.get $count))
  (call $num @root@ (global.get $parent))
  (call $show @root id@ (call $get_property @plugin_root_id@ OUT))
  #0)
