(on request_body
  (if (local.get $eos) (then (return #0)))
  (call $show @part@ (call $get_buffer_bytes #0 #1 #2 OUT))
  (call $show @beyond@ (call $get_buffer_bytes #0 (i32.add (local.get $n) #10) #5 OUT))
  (call $show @more than there is@ (call $get_buffer_bytes #0 #2 #1000 OUT))
  (call $say @overflow@ (call $get_buffer_bytes #0 #-1 #-1 OUT))
  (call $say @status@ (call $get_buffer_status #0 #8 #12))
  (call $two @status@ (i32.load #8) (i32.load #12))
  #0)
