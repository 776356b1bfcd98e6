(func (export "_initialize") (call $log @initialize@))
(func (export "__main_void") (result i32) (call $log @void main@) #0)
